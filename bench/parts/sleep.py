"""Jobs that wait 50 ms, 32 at a time.

As in the part `noop`, with a handler that sleeps for 50 ms, and `OUTBOX_CONCURRENCY` at its default of 32. The ideal is
640 jobs per second. It is listed for comparison, as is the rate of as many threads that only sleep: the kernel wakes
them a little late. The peers are RQ's `SimpleWorker`, which runs one job at a time, and procrastinate with a
concurrency of 32 and tasks in `asyncio.sleep`.
"""

from bench.figure import OURS, Figure
from bench.handlers import SLEEP
from bench.parts.noop import done_per_second, procrastinate, rq
from bench.peers.functions import SLEEP_SECONDS
from bench.testbed import Bench

CONCURRENCY = 32


def measure(bench: Bench) -> list[Figure]:
    """Returns the figures of this part."""
    ideal = CONCURRENCY / SLEEP_SECONDS
    rows, simple, concurrent = bench.size(3_840, 64), bench.size(40, 5), bench.size(960, 64)
    figure = bench.measure_in_turn(
        "sleep",
        "jobs that wait 50 ms, 32 at a time",
        "jobs/s",
        {
            OURS: lambda: done_per_second(bench, SLEEP.name, rows, OUTBOX_CONCURRENCY=str(CONCURRENCY)),
            "ideal": lambda: ideal,
            "threads that only sleep": lambda: bench.run_peer("threads", CONCURRENCY, bench.size(20, 2)),
            "RQ SimpleWorker": lambda: rq(bench, "simple", "sleep", simple),
            "procrastinate, 32 at a time": lambda: procrastinate(bench, CONCURRENCY, "sleep", concurrent),
        },
        target="at least 620 of 640",
    )
    return [figure]
