"""`python -m bench.peers.rq_worker REDIS_URL simple|fork nothing|nap JOBS`: works off a queue with RQ's own workers.

Prints jobs per second, from when the worker begins the first job until it is through with the last, taken in the
worker's own process. `simple` is `SimpleWorker`, `fork` is `Worker`, which forks for each job.
"""

import sys
import time
from typing import Any

import redis
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.worker import SimpleWorker, Worker

from bench.peers import functions


class Timed:
    """Notes when a worker begins its first job and ends its last."""

    begun: float | None = None
    ended = 0.0
    done = 0

    def execute_job(self, *arguments: Any) -> None:
        """Does what the worker does."""
        if self.begun is None:
            self.begun = time.perf_counter()
        super().execute_job(*arguments)  # type: ignore[misc]  # the worker beside it in the bases has it
        self.ended = time.perf_counter()
        self.done += 1


class TimedSimpleWorker(Timed, SimpleWorker):
    """RQ's worker that does jobs in its own process."""


class TimedWorker(Timed, Worker):
    """RQ's worker that forks."""


def main(redis_url: str, kind: str, function: str, jobs: int) -> None:
    """Measures once."""
    queue = Queue("default", connection=redis.Redis.from_url(redis_url), serializer=JSONSerializer)
    called = getattr(functions, function)
    queue.enqueue_many([Queue.prepare_data(called, result_ttl=0) for _ in range(jobs)])
    made = TimedSimpleWorker if kind == "simple" else TimedWorker
    worker = made([queue], connection=queue.connection, serializer=JSONSerializer)
    worker.work(burst=True, logging_level="WARNING")
    assert worker.begun is not None
    assert worker.done == jobs
    assert worker.failed_job_count == 0
    print(jobs / (worker.ended - worker.begun))  # noqa: T201 - the answer


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
