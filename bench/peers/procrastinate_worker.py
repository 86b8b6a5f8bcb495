"""`python -m bench.peers.procrastinate_worker DATABASE_URL CONCURRENCY noop|sleep JOBS`: runs one procrastinate worker.

Prints jobs per second between the first `started` and the last `succeeded` in procrastinate's table of events: by the
clock of Postgres, as for ours. It uses the psycopg connector with its default pool (a connection per job was slower for
20 jobs on two cores) and asynchronous tasks.
"""

import asyncio
import sys

import procrastinate
import psycopg

from bench.peers.functions import SLEEP_SECONDS

_BATCH = 1000
_RATE = """
SELECT count(*) FILTER (WHERE type = 'succeeded'),
       extract(epoch FROM max(at) FILTER (WHERE type = 'succeeded') - min(at) FILTER (WHERE type = 'started'))
FROM procrastinate_events
"""


async def main(database_url: str, concurrency: int, function: str, jobs: int) -> None:
    """Measures once, in an empty database."""
    connector = procrastinate.PsycopgConnector(conninfo=database_url)
    app = procrastinate.App(connector=connector)

    @app.task(name="noop")
    async def noop() -> None: ...

    @app.task(name="sleep")
    async def sleep() -> None:
        await asyncio.sleep(SLEEP_SECONDS)

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        task = {"noop": noop, "sleep": sleep}[function]
        for first in range(0, jobs, _BATCH):
            await task.batch_defer_async(*({} for _ in range(min(_BATCH, jobs - first))))
        await connector.execute_query_async("ANALYZE")
        await app.run_worker_async(wait=False, concurrency=concurrency, install_signal_handlers=False)
    with psycopg.connect(database_url) as connection:
        row = connection.execute(_RATE).fetchone()
    assert row is not None
    assert row[0] == jobs
    print(jobs / float(row[1]))  # noqa: T201 - the result


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
