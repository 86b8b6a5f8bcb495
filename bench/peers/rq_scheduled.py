"""`python -m bench.peers.rq_scheduled REDIS_URL JOBS`: schedules and enqueues jobs with rq-scheduler.

Prints jobs per second over both steps: a loop of `Scheduler.enqueue_at`, and `Scheduler.enqueue_jobs`, which
rq-scheduler's own process calls for due jobs. The jobs are due from the start, so no time passes between the steps.
"""

import datetime as dt
import sys
import time

import redis
from rq.queue import Queue
from rq_scheduler import Scheduler

from bench.peers.functions import noop


def main(redis_url: str, jobs: int) -> None:
    """Measures once."""
    client = redis.Redis.from_url(redis_url)
    scheduler = Scheduler("default", connection=client)
    past = dt.datetime.now(dt.UTC).replace(tzinfo=None) - dt.timedelta(seconds=2)  # rq-scheduler takes naive UTC
    begun = time.perf_counter()
    for _ in range(jobs):
        scheduler.enqueue_at(past, noop)
    scheduler.enqueue_jobs()
    seconds = time.perf_counter() - begun
    assert Queue("default", connection=client).count == jobs
    print(jobs / seconds)  # noqa: T201 - the result


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
