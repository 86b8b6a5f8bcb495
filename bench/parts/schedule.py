"""Delayed rows through rq-scheduler's set.

One relay process finds rows that are all due at the same moment some seconds ahead, writes them to rq-scheduler's set,
and moves them to the queue when they are due. The rate is rows / (writing + moving), without the time in between.
Writing is timed as in the part `relay`: from the transaction that hands over the first row until none is pending, by
the clock of Postgres. Moving is timed from the last poll (every 2 ms) that found the set complete until the last job is
in the queue. The peer is rq-scheduler itself: a loop of `Scheduler.enqueue_at`, and `enqueue_jobs()`, which moves one
job at a time. Its rate covers both, with jobs that are due from the start, so that it never waits.
"""

import time

import redis

from bench.figure import OURS, Figure
from bench.handlers import NOOP
from bench.process import Process
from bench.rows import AMPLE_WINDOW, QUEUE_KEY, SCHEDULE_KEY, add_rows, await_length, time_hand_over
from bench.testbed import Bench

_POLL_INTERVAL = 0.002
"""Seconds."""


def measure(bench: Bench) -> list[Figure]:
    """Returns the figures of this part."""
    peer_jobs = bench.size(1_500, 100)
    figure = bench.measure_in_turn(
        "schedule",
        "delayed rows through rq-scheduler's set",
        "rows/s",
        {
            OURS: lambda: _measure_ours(bench, bench.size(20_000, 500)),
            "rq-scheduler": lambda: _measure_peer(bench, peer_jobs),
        },
        target="at least 20,000 and 8 x rq-scheduler",
    )
    return [figure]


def _measure_ours(bench: Bench, rows: int) -> float:
    bench.reset()
    delay = 2.5 + rows / 10_000  # enough for a slow machine to start a relay that writes them all
    with bench.connect() as connection, bench.redis_client() as client:
        add_rows(connection, rows, NOOP.name, delay=delay)
        with bench.start("relay", OUTBOX_WINDOW=str(AMPLE_WINDOW)) as relay:
            await_length(client, SCHEDULE_KEY, rows, [relay])
            writing = time_hand_over(connection, [relay])
            begun = _await_move(client, rows, relay)
            await_length(client, QUEUE_KEY, rows, [relay], interval=_POLL_INTERVAL)
            return rows / (writing + time.perf_counter() - begun)


def _await_move(client: redis.Redis, rows: int, relay: Process) -> float:
    """Waits for the first job to leave the set, and returns the last time at which the set was complete."""
    complete_at = time.perf_counter()
    while client.zcard(SCHEDULE_KEY) == rows:
        complete_at = time.perf_counter()
        relay.check()
        time.sleep(_POLL_INTERVAL)
    return complete_at


def _measure_peer(bench: Bench, jobs: int) -> float:
    bench.empty_redis()
    return bench.run_peer("rq_scheduled", bench.redis_url, jobs)
