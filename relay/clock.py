"""Postgres' time, as the relay knows it between two looks."""

import time

MAX_AGE = 10.0
"""Seconds after which Postgres should be asked again; two clocks drift by microseconds in that time."""


class Clock:
    """Goes on from the last time that Postgres told, so that the relay's own clock never matters.

    What Postgres tells is older by the answer's way here, so this clock is late by that much and never early.
    """

    def __init__(self) -> None:
        self._offset = 0.0
        self._set_at: float | None = None

    def is_stale(self) -> bool:
        """Whether Postgres was never asked, or not for a while."""
        return self._set_at is None or time.monotonic() - self._set_at > MAX_AGE

    def set(self, now: float) -> None:
        """Takes over what Postgres has just told, in seconds since the epoch."""
        self._set_at = time.monotonic()
        self._offset = now - self._set_at

    def now(self) -> float:
        """Returns the seconds since the epoch."""
        return time.monotonic() + self._offset
