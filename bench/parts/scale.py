"""What a long history, a long backlog and more processes do to the speed, and what a row takes of disk and memory.

**History.** Three databases with a million pending rows each, half in either queue, and none, one or ten million `done`
rows beside them. In each in turn, five batches of 2,000 rows, which fill a window, are handed over and then claimed 32
at a time (as many as a worker has handlers), marked and forgotten by Redis. The drain rate is rows by the seconds
within `relay.publish`'s calls; the claim time is the median of `worker.claim`'s calls; both in this process, without
logs.

**Backlog.** The same with 10,000, 100,000 and half a million pending rows of the queue, and no history but that of the
runs themselves.

**Relays.** Four relay processes at default settings on the ten million's database, whose windows are full; one, two or
four of them are let go on, the others stay stopped, at the moment at which both windows (20,000 rows in all) have been
emptied. Timed from that moment until Redis holds 20,000 jobs again. Redis' memory is the highest `used_memory` seen
with all four, every 20 ms.

**Workers.** One relay and one, two or four worker processes at default settings, each of these fleets with databases of
its own; 20,000 rows whose handler does nothing, for one fleet after the other, timed from the first claim until all
are done.

**Bytes per row.** One row's whole life with nothing beside it: added in a transaction of its own, handed over and
claimed in the batches above, marked. WAL is what Postgres has written for that, tables and indexes what they have
grown by before any vacuum, and at rest what a vacuumed `done` row takes in the ten million's table.
"""

from bench.measure import Figure
from bench.scale.backlog import of_backlogs
from bench.scale.disk import bytes_at_rest, of_bytes
from bench.scale.fleets import of_relays, of_workers
from bench.scale.history import histories, of_histories
from bench.stage import Bench


def measure(bench: Bench) -> list[Figure]:
    """Measures the part."""
    million = bench.size(1_000_000, 12_000)
    databases = histories(bench, million)
    figures = of_histories(bench, databases)
    longest = databases[max(databases)]
    at_rest = bytes_at_rest(longest)
    figures.append(of_backlogs(bench, databases[0], million // 2))
    figures += of_relays(bench, longest)
    figures.append(of_workers(bench))
    return [*figures, *of_bytes(bench, at_rest)]
