"""`python -m bench.peers.rq_scheduled REDIS_URL JOBS`: schedules jobs with rq-scheduler, and has it enqueue them.

Prints jobs per second over both: a loop of `Scheduler.enqueue_at`, and `Scheduler.enqueue_jobs`, which is what its own
process calls for whatever is due. The jobs are due from the start, so that there is no waiting in between.
"""

import datetime as dt
import sys
import time

import redis
from rq.queue import Queue
from rq_scheduler import Scheduler

from bench.peers.functions import nothing


def main(redis_url: str, jobs: int) -> None:
    """Measures once."""
    client = redis.Redis.from_url(redis_url)
    scheduler = Scheduler("default", connection=client)
    past = dt.datetime.now(dt.UTC).replace(tzinfo=None) - dt.timedelta(seconds=2)  # it takes naive UTC
    begun = time.perf_counter()
    for _ in range(jobs):
        scheduler.enqueue_at(past, nothing)
    scheduler.enqueue_jobs()
    seconds = time.perf_counter() - begun
    assert Queue("default", connection=client).count == jobs
    print(jobs / seconds)  # noqa: T201 - the answer


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
