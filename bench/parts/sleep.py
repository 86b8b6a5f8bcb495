"""Jobs that wait 50 ms for something outside, 32 at a time.

As in the part `noop`, with a handler that sleeps for 50 ms, and `OUTBOX_CONCURRENCY` at its default of 32: ideally 640
jobs end per second, and that constant is given beside, with what as many threads reach that do nothing but nap: the
kernel wakes them a little late. The peers: RQ's `SimpleWorker`, which does one at a time, and
procrastinate with a concurrency of 32 and tasks in `asyncio.sleep`.
"""

from bench.handlers import SLEEP
from bench.measure import OURS, Figure
from bench.parts.noop import done_per_second, procrastinate, rq
from bench.peers.functions import NAP
from bench.stage import Bench

CONCURRENCY = 32


def measure(bench: Bench) -> list[Figure]:
    """Measures the part."""
    ideal = CONCURRENCY / NAP
    rows, simple, concurrent = bench.size(3_840, 64), bench.size(40, 5), bench.size(960, 64)
    figure = bench.in_turn(
        "sleep",
        "jobs that wait 50 ms, 32 at a time",
        "jobs/s",
        {
            OURS: lambda: done_per_second(bench, SLEEP.name, rows, OUTBOX_CONCURRENCY=str(CONCURRENCY)),
            "the ideal": lambda: ideal,
            "threads that only nap": lambda: bench.peer("threads", CONCURRENCY, bench.size(20, 2)),
            "RQ SimpleWorker": lambda: rq(bench, "simple", "nap", simple),
            "procrastinate, 32 at a time": lambda: procrastinate(bench, CONCURRENCY, "nap", concurrent),
        },
        target="at least 620 of 640",
    )
    return [figure]
