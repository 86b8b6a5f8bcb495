"""No-op jobs, in one worker process.

A relay's code has handed the jobs over before the worker begins, and they are under another key until the worker has
registered. Timed by the clock of Postgres, from the transaction that claims the first row until every row is done and
committed. The worker has default settings (32 threads). Every peer is one process too, runs about as many jobs as it
can in the same time, and, like our worker here, logs warnings only. The start of a process is never included.

RQ's `SimpleWorker` and `Worker` store their state in Redis only. They are timed in their process, from the start of the
first job to the end of the last. procrastinate, with a concurrency of 1 and of 20, stores it in Postgres. It is timed
by its table of events, from the first `started` to the last `succeeded`. pgqueuer stores it in Postgres. It is timed in
its process, from the first query for jobs to the end of the last write of outcomes: with the five managers and batches
of 10 of its own benchmark, and with batches of 500, about the fastest size that we tried. All use the same Postgres,
with the same durability.
"""

from bench.figure import OURS, Figure
from bench.handlers import NOOP
from bench.rows import QUEUE, add_rows, hand_over, time_workers
from bench.testbed import Bench


def measure(bench: Bench) -> list[Figure]:
    """Returns the figures of this part."""
    simple, fork = bench.size(500, 20), bench.size(150, 10)
    one, twenty, batches = bench.size(600, 20), bench.size(800, 40), bench.size(10_000, 200)
    figure = bench.measure_in_turn(
        "noop",
        "no-op jobs, one worker process",
        "jobs/s",
        {
            OURS: lambda: done_per_second(bench, NOOP.name, bench.size(16_000, 200)),
            "RQ SimpleWorker": lambda: rq(bench, "simple", "noop", simple),
            "RQ Worker": lambda: rq(bench, "fork", "noop", fork),
            "procrastinate, 1 at a time": lambda: procrastinate(bench, 1, "noop", one),
            "procrastinate, 20 at a time": lambda: procrastinate(bench, 20, "noop", twenty),
            "pgqueuer, 5 x 10": lambda: _pgqueuer(bench, 10, batches),
            "pgqueuer, 5 x 500": lambda: _pgqueuer(bench, 500, batches),
        },
        target="at least 12,000, 40 x SimpleWorker, and ahead of pgqueuer",
    )
    return [figure]


def done_per_second(bench: Bench, task: str, rows: int, **env: str) -> float:
    """Runs rows in one worker, and returns rows per second.

    Args:
        bench: the bench.
        task: name of a task in `bench.handlers`.
        rows: number of rows.
        env: further settings of the worker.
    """
    bench.reset()
    with bench.connect() as connection:
        add_rows(connection, rows, task)
    hand_over(bench)
    return rows / time_workers(bench, QUEUE, 1, OUTBOX_HANDLERS="bench.handlers", **env)


def rq(bench: Bench, kind: str, function: str, jobs: int) -> float:
    """Runs jobs in one of RQ's workers, and returns jobs per second; see `bench.peers.rq_worker`."""
    bench.empty_redis()
    return bench.run_peer("rq_worker", bench.redis_url, kind, function, jobs)


def procrastinate(bench: Bench, concurrency: int, function: str, jobs: int) -> float:
    """Runs jobs in procrastinate's worker, and returns jobs per second; see `bench.peers.procrastinate_worker`."""
    return bench.run_peer("procrastinate_worker", bench.create_database(), concurrency, function, jobs)


def _pgqueuer(bench: Bench, batch: int, jobs: int) -> float:
    return bench.run_peer("pgqueuer_worker", bench.create_database(), 5, batch, jobs)
