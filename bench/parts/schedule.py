"""Rows of the near future through rq-scheduler's set.

One relay process finds rows that are all due at the same moment some seconds ahead, hands them to rq-scheduler's set,
and moves them to the queue when their time has come. The rate is rows / (writing + moving), without the waiting in
between. Writing is timed as in the part `relay`: from the transaction that claims the first row until none is pending,
by Postgres' clock. Moving is timed from the last look (every 2 ms) at which the set was still whole, its jobs being
due, until the last is in the queue. The peer is rq-scheduler's own path: a loop of `Scheduler.enqueue_at`, and its
`enqueue_jobs()`, which moves job by job; both added up, with jobs that are due at once, so that it waits for nothing.
"""

import time

import redis

from bench.handlers import NOOP
from bench.measure import OURS, Figure
from bench.process import Process
from bench.rows import AMPLE_WINDOW, QUEUED, SCHEDULED, add_rows, await_length, seconds_to_hand_over
from bench.stage import Bench

_LOOK = 0.002


def measure(bench: Bench) -> list[Figure]:
    """Measures the part."""
    peer_jobs = bench.size(1_500, 100)
    figure = bench.in_turn(
        "schedule",
        "rows of the near future through rq-scheduler's set",
        "rows/s",
        {
            OURS: lambda: _ours(bench, bench.size(20_000, 500)),
            "rq-scheduler": lambda: _peer(bench, peer_jobs),
        },
        target="at least 20,000 and 8 x rq-scheduler",
    )
    return [figure]


def _ours(bench: Bench, rows: int) -> float:
    bench.fresh()
    delay = 2.5 + rows / 10_000  # by then a slow machine, too, must have started a relay that has written all of them
    with bench.connect() as connection, bench.client() as client:
        add_rows(connection, rows, NOOP.name, delay=delay)
        with bench.start("relay", OUTBOX_WINDOW=str(AMPLE_WINDOW)) as relay:
            await_length(client, SCHEDULED, rows, [relay])
            writing = seconds_to_hand_over(connection, [relay])
            begun = _end_of_waiting(client, rows, relay)
            await_length(client, QUEUED, rows, [relay], pause=_LOOK)
            return rows / (writing + time.perf_counter() - begun)


def _end_of_waiting(client: redis.Redis, rows: int, relay: Process) -> float:
    """Waits for the first job to leave the set, and returns when that was last seen whole."""
    whole = time.perf_counter()
    while client.zcard(SCHEDULED) == rows:
        whole = time.perf_counter()
        relay.check()
        time.sleep(_LOOK)
    return whole


def _peer(bench: Bench, jobs: int) -> float:
    bench.empty_redis()
    return bench.peer("rq_scheduled", bench.redis_url, jobs)
