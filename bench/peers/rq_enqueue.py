"""`python -m bench.peers.rq_enqueue REDIS_URL many|one JOBS`: puts no-op jobs into RQ's queue, as its callers do.

Prints jobs per second, from before the first call to after the last: `many` by `Queue.enqueue_many`, 1,000 at a time,
`one` by `Queue.enqueue` for each. Both in JSON, as our relay writes them.
"""

import sys
import time

import redis
from rq.queue import Queue
from rq.serializers import JSONSerializer

from bench.peers.functions import nothing

BATCH = 1000


def main(redis_url: str, how: str, jobs: int) -> None:
    """Measures once."""
    queue = Queue("default", connection=redis.Redis.from_url(redis_url), serializer=JSONSerializer)
    queue.connection.ping()
    begun = time.perf_counter()
    if how == "many":
        enqueue_many(queue, jobs)
    else:
        for _ in range(jobs):
            queue.enqueue(nothing, result_ttl=0)
    seconds = time.perf_counter() - begun
    assert queue.count == jobs
    print(jobs / seconds)  # noqa: T201 - the answer


def enqueue_many(queue: Queue, jobs: int) -> None:
    """Enqueues no-op jobs, 1,000 at a time."""
    for first in range(0, jobs, BATCH):
        number = min(BATCH, jobs - first)
        queue.enqueue_many([Queue.prepare_data(nothing, result_ttl=0) for _ in range(number)])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
