"""Throughput with a long history, a long backlog and more processes; disk and memory per row.

**History.** Three databases have a million pending rows each, half of them in each queue, and no, one million or ten
million `done` rows. In each in turn, five batches of 2,000 rows, which fill a window, are handed over, then removed
from Redis, claimed 32 at a time (the number of a worker's threads) and completed. The drain rate is rows per second
spent in `publish` of the relay. The claim time is the median of the calls of `claim` of the worker. Both run in this
process, without logs.

**Backlog.** The same with 10,000, 100,000 and half a million pending rows of the queue, and no done rows except those
of earlier runs.

**Relays.** Four relay processes at default settings run on the database with ten million done rows until both windows
are full. Then all are stopped, the windows (20,000 rows in all) are emptied, and one, two or four relays continue. The
time runs until Redis holds 20,000 jobs again. The memory of Redis is the highest `used_memory` with four relays,
sampled every 20 ms.

**Workers.** One relay and one, two or four worker processes at default settings run 20,000 no-op rows, from the first
claim until all are done. Each such fleet has databases of its own, and they run in turn.

**Bytes per row.** The whole life of a row: added in a transaction of its own, handed over and claimed in batches as
above, completed. WAL is what Postgres writes for that, and table and indexes are what they grow by before any vacuum.
After a vacuum, the size per `done` row is measured in the table with ten million.
"""

from bench.figure import Figure
from bench.scale.backlog import measure_backlogs
from bench.scale.disk import bytes_at_rest, measure_disk
from bench.scale.fleets import measure_relays, measure_workers
from bench.scale.history import create_histories, measure_histories
from bench.testbed import Bench


def measure(bench: Bench) -> list[Figure]:
    """Returns the figures of this part."""
    million = bench.size(1_000_000, 12_000)
    databases = create_histories(bench, million)
    figures = measure_histories(bench, databases)
    longest = databases[max(databases)]
    at_rest = bytes_at_rest(longest)
    figures.append(measure_backlogs(bench, databases[0], million // 2))
    figures += measure_relays(bench, longest)
    figures.append(measure_workers(bench))
    return [*figures, *measure_disk(bench, at_rest)]
