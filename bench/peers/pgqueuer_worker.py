"""`python -m bench.peers.pgqueuer_worker DATABASE_URL MANAGERS BATCH JOBS`: drains a pgqueuer queue in one process.

Prints jobs per second, from the start of the first query for jobs to the end of the last write of outcomes, timed in
the same process. The set-up is that of pgqueuer's own benchmark: the asyncpg driver, uvloop, and several queue managers
in one process with a connection each. Its tables are durable, which is its default, as ours are.
"""

import asyncio
import os
import sys
import time
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import uvloop
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.qm import QueueManager
from pgqueuer.queries import Queries
from pgqueuer.types import QueueExecutionMode

_BATCH = 1000


class Stopwatch:
    """The time of the first query for jobs, and of the last write of outcomes, by any manager."""

    def __init__(self, jobs: int) -> None:
        self.begun: float | None = None
        self.ended = 0.0
        self.remaining = jobs
        self.finished = asyncio.Event()


class TimedQueries(Queries):
    """pgqueuer's queries, timed."""

    watch: Stopwatch

    async def dequeue(self, *arguments: Any, **options: Any) -> Any:
        """Times the first query for jobs."""
        if self.watch.begun is None:
            self.watch.begun = time.perf_counter()
        return await super().dequeue(*arguments, **options)

    async def log_jobs(self, job_status: Any) -> None:
        """Times the write of outcomes."""
        await super().log_jobs(job_status)
        self.watch.ended = time.perf_counter()
        self.watch.remaining -= len(job_status)
        if self.watch.remaining <= 0:
            self.watch.finished.set()


async def main(database_url: str, managers: int, batch: int, jobs: int) -> None:
    """Measures once, in an empty database, and exits the process."""
    connections = [await asyncpg.connect(database_url) for _ in range(managers)]
    queries = Queries(AsyncpgDriver(connections[0]))
    await queries.install()
    for begin in range(0, jobs, _BATCH):
        number = min(_BATCH, jobs - begin)
        await queries.enqueue(["noop"] * number, [None] * number, [0] * number)
    await connections[0].execute("ANALYZE")
    watch = Stopwatch(jobs)
    running = asyncio.gather(*(_run(connection, watch, batch) for connection in connections))
    finished = asyncio.ensure_future(watch.finished.wait())
    # A manager that finds the queue empty waits long before it looks again and ends.
    waiting: list[asyncio.Future[Any]] = [running, finished]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    if not finished.done():
        running.result()
    assert watch.begun is not None
    assert watch.remaining == 0
    print(jobs / (watch.ended - watch.begun), flush=True)  # noqa: T201 - the result
    os._exit(0)


async def _run(connection: Any, watch: Stopwatch, batch: int) -> None:
    queries = TimedQueries(AsyncpgDriver(connection))
    queries.watch = watch
    manager = QueueManager(queries)

    @manager.entrypoint("noop")
    async def noop(job: Job) -> None: ...

    await manager.run(batch_size=batch, mode=QueueExecutionMode.drain)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
