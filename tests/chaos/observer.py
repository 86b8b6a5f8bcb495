"""Observes the database: samples the number of rows by state, and reads all rows at the end."""

import asyncio
import math
import time
from dataclasses import dataclass, field

import psycopg

from tests.chaos.evidence import Row, User
from tests.chaos.system import System

INTERVAL = 0.5
"""Seconds between two samples."""

_LIMIT = 2.0
"""Seconds that a sample may take; after that, Postgres counts as away."""

_COUNT = """
SELECT CASE WHEN status IN ('pending', 'enqueued') AND run_at > now() THEN 'not due' ELSE status END AS state, count(*)
FROM outbox
GROUP BY state
"""

# By Postgres' clock only: it may differ from ours.
_WAITING = """
SELECT count(*), coalesce(max(due_in), 0)
FROM (
    SELECT extract(epoch FROM CASE status WHEN 'running' THEN lease_until ELSE run_at END - now())::float8 AS due_in
    FROM outbox
    WHERE status IN ('pending', 'enqueued', 'running')
) AS waiting
WHERE due_in < %s
"""

_USERS = "SELECT username, email, extract(epoch FROM created_at)::float8 FROM users"

_ROWS = """
SELECT id, payload ->> 'username', status, attempts, delivery, max_retries, last_error,
       extract(epoch FROM created_at)::float8, task
FROM outbox
"""


@dataclass
class Observer:
    """Samples the states of the rows until it is cancelled."""

    system: System
    samples: list[tuple[float, dict[str, int] | None]] = field(default_factory=list)
    """Seconds since the epoch, and number of rows by state, `not due` for waiting rows; None while Postgres is away."""

    @property
    def states(self) -> dict[str, int]:
        """The newest counts."""
        return next((states for _, states in reversed(self.samples) if states is not None), {})

    async def run(self) -> None:
        """Samples at a fixed interval, also during outages."""
        while True:
            try:
                async with asyncio.timeout(5), self.system.postgres.connection() as connection:
                    pass
                async with self.system.postgres.connection() as connection:
                    while True:
                        await asyncio.sleep(INTERVAL)
                        async with asyncio.timeout(_LIMIT):
                            cursor = await connection.execute(_COUNT)
                            self.samples.append((time.time(), dict(await cursor.fetchall())))
            except (psycopg.OperationalError, TimeoutError):
                self.samples.append((time.time(), None))
                await asyncio.sleep(INTERVAL)

    async def count_waiting(self, within: float = math.inf) -> tuple[int, float]:
        """Returns the number of unfinished rows, and the seconds until the last of them is due.

        Args:
            within: seconds; later rows are left out.
        """
        async with self.system.postgres.connection() as connection:
            cursor = await connection.execute(_WAITING, [within])
            row = await cursor.fetchone()
        assert row is not None
        return row[0], row[1]

    async def snapshot(self) -> tuple[list[User], list[Row]]:
        """Returns all users and rows from one snapshot."""
        async with self.system.postgres.connection() as connection, connection.transaction():
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            users = await (await connection.execute(_USERS)).fetchall()
            rows = await (await connection.execute(_ROWS)).fetchall()
        return [User(*user) for user in users], [Row(*row) for row in rows]
