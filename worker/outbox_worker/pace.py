"""A pace that what comes by the thousand keeps to."""

import time
from threading import Lock


class Pace:
    """Spreads events over the time to come, so many a second. Safe to share between threads."""

    def __init__(self, rate: float, most: float) -> None:
        """Begins with nothing to spread.

        Args:
            rate: events a second.
            most: seconds that an event is put off at most, whatever came before it.
        """
        self._rate = rate
        self._most = most
        self._next_at = 0.0
        self._lock = Lock()

    def wait(self) -> float:
        """Returns the seconds to put off one more event."""
        now = time.monotonic()
        with self._lock:
            at = min(max(now, self._next_at), now + self._most)
            self._next_at = at + 1 / self._rate
            return at - now
