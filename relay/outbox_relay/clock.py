"""Postgres' time, as the relay knows it between two looks."""

import time


class Clock:
    """Goes on from the last time that Postgres told, so that the relay's own clock never matters.

    What Postgres tells is older by the answer's way here, so this clock is late by that much and never early.
    """

    def __init__(self) -> None:
        self._offset = 0.0

    def set(self, now: float) -> None:
        """Takes over what Postgres has just told, in seconds since the epoch."""
        self._offset = now - time.monotonic()

    def now(self) -> float:
        """Returns the seconds since the epoch."""
        return time.monotonic() + self._offset
