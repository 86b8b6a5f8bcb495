"""Telling the relays that rows were committed: after the commit, debounced, and only ever a hint."""

import asyncio
from typing import Any

from psycopg_pool import AsyncConnectionPool

from outbox.queries import query
from outbox.runtime import logs
from outbox.runtime.redaction import one_line

DEBOUNCE = 0.005
"""Seconds between two hints of one process, at least."""
LONGEST_DEBOUNCE = 1.0
"""The same, at most: a relay at default settings would look of itself by then."""
PART_OF_DELAY = 0.1
"""How much of its delay a row may wait for a hint. Rows that have to wait anyway share one: sent for each of them, it
costs as much of the service's rate as writing them."""


def debounce(delay: float) -> float:
    """Returns the seconds between two hints, at least, where rows are due `delay` seconds after their commit."""
    return min(LONGEST_DEBOUNCE, max(DEBOUNCE, delay * PART_OF_DELAY))


class Wakeup:
    """One task that sends a NOTIFY for any number of commits since the last."""

    def __init__(self, pool: AsyncConnectionPool[Any], delay: float) -> None:
        """Takes the connections, and the delay of the rows that are committed, in seconds."""
        self._pool = pool
        self._debounce = debounce(delay)
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
            except Exception as error:  # noqa: BLE001 - whatever it is, this task must not end over it
                logs.get().debug("hint lost", error=one_line(error))
            await asyncio.sleep(self._debounce)
