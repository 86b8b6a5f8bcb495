"""Postgres' time between two looks."""

import time


class Clock:
    """A clock that is set by each look and runs on from there, so that the time of the relay's machine never matters.

    The answer of a look takes time to arrive. So this clock may be late by that time, but is never early.
    """

    def __init__(self) -> None:
        self._offset = 0.0

    def set(self, now: float) -> None:
        """Sets it to Postgres' time, in seconds since the epoch."""
        self._offset = now - time.monotonic()

    def now(self) -> float:
        """Returns the seconds since the epoch."""
        return time.monotonic() + self._offset
