"""Computes how many rows are worth claiming before a handler thread is free for them."""

from collections.abc import Callable

LOOKAHEAD = 0.2
"""Seconds of work that are claimed ahead, at the recent completion rate, so that no thread is idle during the next
claim. If handlers take longer than that, no row is claimed ahead."""
MAX_AHEAD = 2000
"""Upper bound of rows claimed ahead."""


class Lookahead:
    """Measures the completion rate of the handlers."""

    def __init__(self, threads: int, clock: Callable[[], float]) -> None:
        """Begins with no rows ahead.

        Args:
            threads: number of handler threads.
            clock: returns the time in seconds.
        """
        self._threads = threads
        self._clock = clock
        self._measured_at = clock()
        self._handled = 0
        self._ahead = 0

    def rows_ahead(self, handled: int) -> int:
        """Returns how many rows will be handled in the next `LOOKAHEAD` seconds, up to `MAX_AHEAD`.

        Args:
            handled: how many have been handled so far.
        """
        now = self._clock()
        elapsed = now - self._measured_at
        is_one_per_thread = handled - self._handled >= self._threads and elapsed > LOOKAHEAD / 10
        if is_one_per_thread or elapsed > LOOKAHEAD / 2:
            self._ahead = max(0, min(MAX_AHEAD, int((handled - self._handled) / elapsed * LOOKAHEAD)))
            self._measured_at, self._handled = now, handled
        return self._ahead
