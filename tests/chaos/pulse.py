"""Whether this process keeps up: all bytes pass through it, and where it is late, everything is."""

import asyncio
import time

_BEAT = 0.05
_LATE = 0.1
"""Seconds."""


class Pulse:
    """Beats until it is cancelled, and writes down when it was late."""

    def __init__(self) -> None:
        self.lags: list[tuple[float, float]] = []

    async def run(self) -> None:
        """Beats."""
        while True:
            due = time.time() + _BEAT
            await asyncio.sleep(_BEAT)
            if (now := time.time()) - due > _LATE:
                self.lags.append((due, now))
