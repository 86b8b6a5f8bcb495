"""`python -m bench.peers.rq_worker REDIS_URL simple|fork noop|sleep JOBS`: runs jobs with RQ's own worker.

Prints jobs per second, from the start of the first job to the end of the last, timed in the worker's process. `simple`
is `SimpleWorker`, `fork` is `Worker`, which forks for each job.
"""

import sys
import time
from typing import Any

import redis
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.worker import SimpleWorker, Worker

from bench.peers import functions


class Timing:
    """Records the start of the first job and the end of the last."""

    begun: float | None = None
    ended = 0.0
    done = 0

    def execute_job(self, *arguments: Any) -> None:
        """Runs a job and records its times."""
        if self.begun is None:
            self.begun = time.perf_counter()
        super().execute_job(*arguments)  # type: ignore[misc]  # the other base class has it
        self.ended = time.perf_counter()
        self.done += 1


class TimedSimpleWorker(Timing, SimpleWorker):
    """RQ's worker that runs jobs in its own process, timed."""


class TimedWorker(Timing, Worker):
    """RQ's worker that forks for each job, timed."""


def main(redis_url: str, kind: str, function: str, jobs: int) -> None:
    """Measures once."""
    queue = Queue("default", connection=redis.Redis.from_url(redis_url), serializer=JSONSerializer)
    job_function = getattr(functions, function)
    queue.enqueue_many([Queue.prepare_data(job_function, result_ttl=0) for _ in range(jobs)])
    worker_class = TimedSimpleWorker if kind == "simple" else TimedWorker
    worker = worker_class([queue], connection=queue.connection, serializer=JSONSerializer)
    worker.work(burst=True, logging_level="WARNING")
    assert worker.begun is not None
    assert worker.done == jobs
    assert worker.failed_job_count == 0
    print(jobs / (worker.ended - worker.begun))  # noqa: T201 - the result


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
