"""Spreads events over time."""

import time
from threading import Lock


class Pace:
    """Delays events so that at most a fixed number happens per second. Safe to share between threads."""

    def __init__(self, rate: float, longest: float) -> None:
        """Begins without events.

        Args:
            rate: events per second.
            longest: upper bound of a delay in seconds; beyond it, events come faster than the rate.
        """
        self._rate = rate
        self._longest = longest
        self._next_at = 0.0
        self._lock = Lock()

    def next_delay(self) -> float:
        """Returns the seconds by which to delay one more event."""
        now = time.monotonic()
        with self._lock:
            at = min(max(now, self._next_at), now + self._longest)
            self._next_at = at + 1 / self._rate
            return at - now
