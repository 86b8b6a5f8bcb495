"""Records when this process is late: all bytes pass through it, so that everything else is late too."""

import asyncio
import time

_INTERVAL = 0.05
_MAX_LAG = 0.1
"""Seconds."""


class LagMonitor:
    """Sleeps for short intervals until it is cancelled, and records when it woke late."""

    def __init__(self) -> None:
        self.lags: list[tuple[float, float]] = []

    async def run(self) -> None:
        """Records every lag."""
        while True:
            due = time.time() + _INTERVAL
            await asyncio.sleep(_INTERVAL)
            if (now := time.time()) - due > _MAX_LAG:
                self.lags.append((due, now))
