"""Telling the relays that rows were committed: after the commit, debounced, and only ever a hint."""

import asyncio
from typing import Any

import psycopg
from psycopg_pool import AsyncConnectionPool

from outbox.queries import query

DEBOUNCE = 0.005
"""Seconds between two hints of one process, at least."""


class Wakeup:
    """One task that sends a NOTIFY for any number of commits since the last."""

    def __init__(self, pool: AsyncConnectionPool[Any]) -> None:
        self._pool = pool
        self._committed = asyncio.Event()

    def hint(self) -> None:
        """Asks for a NOTIFY soon. Never waits, never fails."""
        self._committed.set()

    async def run(self) -> None:
        """Sends hints until it is cancelled. One that cannot be sent is forgotten: the relays poll anyway."""
        while True:
            await self._committed.wait()
            self._committed.clear()
            try:
                async with self._pool.connection(timeout=1) as connection:
                    await connection.execute(query("notify_relays"))
            except psycopg.Error:
                pass
            await asyncio.sleep(DEBOUNCE)
