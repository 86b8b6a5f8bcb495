"""Hints to the relays that rows were committed: NOTIFY after the commit, rate-limited. Losing one costs latency."""

import asyncio
from typing import Any

from psycopg_pool import AsyncConnectionPool

from outbox.queries import query
from outbox.runtime import logs
from outbox.runtime.redaction import one_line

MIN_INTERVAL = 0.005
"""Minimum seconds between two hints of one process."""
MAX_INTERVAL = 1.0
"""Upper bound of that minimum for delayed rows: a relay at default settings polls within this time anyway."""
FRACTION_OF_DELAY = 0.1
"""Fraction of its delay that a row may wait for its hint. Delayed rows share hints: one for each row would reduce the
service's rate as much as writing the rows does."""


def hint_interval(delay: float) -> float:
    """Returns the minimum seconds between two hints for rows that are due `delay` seconds after their commit."""
    return min(MAX_INTERVAL, max(MIN_INTERVAL, delay * FRACTION_OF_DELAY))


class RelayNotifier:
    """Sends one NOTIFY for all commits since the last one."""

    def __init__(self, pool: AsyncConnectionPool[Any], delay: float) -> None:
        """Makes a notifier for rows that are due `delay` seconds after their commit."""
        self._pool = pool
        self._interval = hint_interval(delay)
        self._committed = asyncio.Event()

    def notify_soon(self) -> None:
        """Requests a hint. Never waits, never fails."""
        self._committed.set()

    async def run(self) -> None:
        """Sends hints until it is cancelled. A hint that cannot be sent is dropped: the relays poll anyway."""
        while True:
            await self._committed.wait()
            self._committed.clear()
            try:
                async with self._pool.connection(timeout=1) as connection:
                    await connection.execute(query("notify_relays"))
            except Exception as error:  # noqa: BLE001 - no error may end this task
                logs.get().debug("hint lost", error=one_line(error))
            await asyncio.sleep(self._interval)
