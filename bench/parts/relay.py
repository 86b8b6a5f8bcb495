"""Pending rows to RQ's queue.

One relay process works off a backlog of rows that are all due, with a window that holds them all and its defaults
otherwise. Timed from the transaction that claims the first row until none is pending any more (so the last is marked
and committed, and its job in Redis), by Postgres' clock; the start of the process is not in it. The peers put jobs of
the same size and format into the same Redis from one process, and read and mark nothing anywhere: RQ's
`Queue.enqueue_many`, 1,000 jobs at a time, and `Queue.enqueue`, one at a time, each timed from the first call to the
return of the last.
"""

from bench.handlers import NOOP
from bench.measure import OURS, Figure
from bench.rows import AMPLE_WINDOW, QUEUED, add_rows, await_length, seconds_to_hand_over
from bench.stage import Bench


def measure(bench: Bench) -> list[Figure]:
    """Measures the part."""
    many, single = bench.size(20_000, 200), bench.size(3_000, 100)
    figure = bench.in_turn(
        "relay",
        "due rows to RQ's queue",
        "rows/s",
        {
            OURS: lambda: _ours(bench, bench.size(100_000, 500)),
            "RQ enqueue_many": lambda: _peer(bench, "many", many),
            "RQ enqueue": lambda: _peer(bench, "one", single),
        },
        target="at least 40,000 and 3 x enqueue_many",
    )
    return [figure]


def _ours(bench: Bench, rows: int) -> float:
    bench.fresh()
    with bench.connect() as connection, bench.client() as client:
        add_rows(connection, rows, NOOP.name)
        with bench.start("relay", OUTBOX_WINDOW=str(AMPLE_WINDOW)) as relay:
            await_length(client, QUEUED, rows, [relay])
            return rows / seconds_to_hand_over(connection, [relay])


def _peer(bench: Bench, how: str, jobs: int) -> float:
    bench.empty_redis()
    return bench.peer("rq_enqueue", bench.redis_url, how, jobs)
