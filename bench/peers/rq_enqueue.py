"""`python -m bench.peers.rq_enqueue REDIS_URL many|one JOBS`: enqueues no-op jobs with RQ.

Prints jobs per second, from before the first call to after the last. `many` calls `Queue.enqueue_many` with 1,000 jobs
at a time, `one` calls `Queue.enqueue` for each job. Both write JSON, as our relay does.
"""

import sys
import time

import redis
from rq.queue import Queue
from rq.serializers import JSONSerializer

from bench.peers.functions import noop

_BATCH = 1000


def main(redis_url: str, method: str, jobs: int) -> None:
    """Measures once."""
    queue = Queue("default", connection=redis.Redis.from_url(redis_url), serializer=JSONSerializer)
    queue.connection.ping()
    begun = time.perf_counter()
    if method == "many":
        _enqueue_many(queue, jobs)
    else:
        for _ in range(jobs):
            queue.enqueue(noop, result_ttl=0)
    seconds = time.perf_counter() - begun
    assert queue.count == jobs
    print(jobs / seconds)  # noqa: T201 - the result


def _enqueue_many(queue: Queue, jobs: int) -> None:
    """Enqueues no-op jobs, 1,000 at a time."""
    for first in range(0, jobs, _BATCH):
        number = min(_BATCH, jobs - first)
        queue.enqueue_many([Queue.prepare_data(noop, result_ttl=0) for _ in range(number)])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
