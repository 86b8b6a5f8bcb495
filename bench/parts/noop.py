"""Jobs that do nothing, in one worker process.

The jobs are in Redis before the worker begins: handed over as a relay does it, and put aside until the worker waits for
them. Timed from the transaction that claims the first row until every row is marked done and committed, by Postgres'
clock; the start of the process is not in it, for nobody. The worker has its defaults (32 threads). Every peer is one
process too, does as many jobs as it can in about the same time, and, as ours here, logs warnings only.

RQ's `SimpleWorker` and `Worker` keep their books in Redis alone; timed in their process, from the begin of the first
job to the end of the last. procrastinate, with a concurrency of 1 and of 20, keeps them in Postgres; timed by its own
table of events, from the first `started` to the last `succeeded`. pgqueuer keeps them in Postgres; timed in its
process, from its first query for jobs to the end of its last write of what became of them: with the five managers and
batches of 10 that its own benchmark tool has, and with batches of 500, about the fastest of what we tried. All are on
the same Postgres, with the same durability.
"""

from bench.handlers import NOOP
from bench.measure import OURS, Figure
from bench.rows import QUEUE, add_rows, hand_over, seconds_to_work_off
from bench.stage import Bench


def measure(bench: Bench) -> list[Figure]:
    """Measures the part."""
    simple, fork = bench.size(500, 20), bench.size(150, 10)
    one, twenty, batches = bench.size(600, 20), bench.size(800, 40), bench.size(10_000, 200)
    figure = bench.in_turn(
        "noop",
        "jobs that do nothing, one worker process",
        "jobs/s",
        {
            OURS: lambda: done_per_second(bench, NOOP.name, bench.size(16_000, 200)),
            "RQ SimpleWorker": lambda: rq(bench, "simple", "nothing", simple),
            "RQ Worker": lambda: rq(bench, "fork", "nothing", fork),
            "procrastinate, 1 at a time": lambda: procrastinate(bench, 1, "nothing", one),
            "procrastinate, 20 at a time": lambda: procrastinate(bench, 20, "nothing", twenty),
            "pgqueuer, 5 x 10": lambda: _pgqueuer(bench, 10, batches),
            "pgqueuer, 5 x 500": lambda: _pgqueuer(bench, 500, batches),
        },
        target="at least 12,000, 40 x SimpleWorker, and ahead of pgqueuer",
    )
    return [figure]


def done_per_second(bench: Bench, task: str, rows: int, **env: str) -> float:
    """Has one worker do rows that wait in Redis, and returns how many it does per second.

    Args:
        bench: the stage.
        task: one of `bench.handlers`.
        rows: how many.
        env: further settings of the worker.
    """
    bench.fresh()
    with bench.connect() as connection:
        add_rows(connection, rows, task)
    hand_over(bench)
    return rows / seconds_to_work_off(bench, QUEUE, 1, OUTBOX_HANDLERS="bench.handlers", **env)


def rq(bench: Bench, kind: str, function: str, jobs: int) -> float:
    """Has one of RQ's workers do jobs; see `bench.peers.rq_worker`."""
    bench.empty_redis()
    return bench.peer("rq_worker", bench.redis_url, kind, function, jobs)


def procrastinate(bench: Bench, concurrency: int, function: str, jobs: int) -> float:
    """Has procrastinate's worker do jobs; see `bench.peers.procrastinate_worker`."""
    return bench.peer("procrastinate_worker", bench.database(), concurrency, function, jobs)


def _pgqueuer(bench: Bench, batch: int, jobs: int) -> float:
    return bench.peer("pgqueuer_worker", bench.database(), 5, batch, jobs)
