"""Due rows to RQ's queue.

One relay process hands over a backlog of due rows, with a window that has room for all and default settings otherwise.
It is timed by the clock of Postgres, from the transaction that hands over the first row until no row is pending, which
means that the last is committed and its job in Redis. The start of the process is not included. The peers put jobs of
the same size and format into the same Redis from one process, without a database: RQ's `Queue.enqueue_many` with 1,000
jobs at a time, and `Queue.enqueue` with one. They are timed from the first call to the return of the last.
"""

from bench.figure import OURS, Figure
from bench.handlers import NOOP
from bench.rows import AMPLE_WINDOW, QUEUE_KEY, add_rows, await_length, time_hand_over
from bench.testbed import Bench


def measure(bench: Bench) -> list[Figure]:
    """Returns the figures of this part."""
    many, single = bench.size(20_000, 200), bench.size(3_000, 100)
    figure = bench.measure_in_turn(
        "relay",
        "due rows to RQ's queue",
        "rows/s",
        {
            OURS: lambda: _measure_ours(bench, bench.size(100_000, 500)),
            "RQ enqueue_many": lambda: _measure_peer(bench, "many", many),
            "RQ enqueue": lambda: _measure_peer(bench, "one", single),
        },
        target="at least 40,000 and 3 x enqueue_many",
    )
    return [figure]


def _measure_ours(bench: Bench, rows: int) -> float:
    bench.reset()
    with bench.connect() as connection, bench.redis_client() as client:
        add_rows(connection, rows, NOOP.name)
        with bench.start("relay", OUTBOX_WINDOW=str(AMPLE_WINDOW)) as relay:
            await_length(client, QUEUE_KEY, rows, [relay])
            return rows / time_hand_over(connection, [relay])


def _measure_peer(bench: Bench, how: str, jobs: int) -> float:
    bench.empty_redis()
    return bench.run_peer("rq_enqueue", bench.redis_url, how, jobs)
