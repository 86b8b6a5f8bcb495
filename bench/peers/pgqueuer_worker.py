"""`python -m bench.peers.pgqueuer_worker DATABASE_URL MANAGERS BATCH JOBS`: one process drains a queue of pgqueuer.

Prints jobs per second, from when its first query for jobs begins until its last write of what became of them ends,
taken in its own process. As its own benchmark tool does: the asyncpg driver, uvloop, and several queue managers in one
process with a connection each. Its tables are as durable as ours, which is its default.
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

_ENQUEUED_AT_ONCE = 1000


class Stopwatch:
    """Of all managers: when the first began to look for jobs, and when what became of the last was written."""

    def __init__(self, jobs: int) -> None:
        self.begun: float | None = None
        self.ended = 0.0
        self.left = jobs
        self.finished = asyncio.Event()


class TimedQueries(Queries):
    """pgqueuer's queries, with a look at the clock."""

    watch: Stopwatch

    async def dequeue(self, *arguments: Any, **options: Any) -> Any:
        """Does what pgqueuer does."""
        if self.watch.begun is None:
            self.watch.begun = time.perf_counter()
        return await super().dequeue(*arguments, **options)

    async def log_jobs(self, job_status: Any) -> None:
        """Does what pgqueuer does."""
        await super().log_jobs(job_status)
        self.watch.ended = time.perf_counter()
        self.watch.left -= len(job_status)
        if self.watch.left <= 0:
            self.watch.finished.set()


async def main(database_url: str, managers: int, batch: int, jobs: int) -> None:
    """Measures once, in an empty database."""
    connections = [await asyncpg.connect(database_url) for _ in range(managers)]
    first = Queries(AsyncpgDriver(connections[0]))
    await first.install()
    for begin in range(0, jobs, _ENQUEUED_AT_ONCE):
        number = min(_ENQUEUED_AT_ONCE, jobs - begin)
        await first.enqueue(["nothing"] * number, [None] * number, [0] * number)
    await connections[0].execute("ANALYZE")
    watch = Stopwatch(jobs)
    running = asyncio.gather(*(_run(connection, watch, batch) for connection in connections))
    finished = asyncio.ensure_future(watch.finished.wait())
    # A manager that finds nothing more waits for long before it looks again and ends.
    waiting: list[asyncio.Future[Any]] = [running, finished]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    if not finished.done():
        running.result()
    assert watch.begun is not None
    assert watch.left == 0
    print(jobs / (watch.ended - watch.begun), flush=True)  # noqa: T201 - the answer
    os._exit(0)


async def _run(connection: Any, watch: Stopwatch, batch: int) -> None:
    queries = TimedQueries(AsyncpgDriver(connection))
    queries.watch = watch
    manager = QueueManager(queries)

    @manager.entrypoint("nothing")
    async def nothing(job: Job) -> None: ...

    await manager.run(batch_size=batch, mode=QueueExecutionMode.drain)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
