"""How many rows are worth claiming before a handler thread is free for them."""

import time

LOOKAHEAD = 0.2
"""Seconds of work that are claimed ahead, at the recent completion rate, so that no thread is idle during the next
claim. If handlers take long, that is no row."""
MAX_AHEAD = 2000
"""Upper bound of rows claimed ahead."""


class Lookahead:
    """Measures the handlers' completion rate, and how many rows to claim ahead at that rate."""

    def __init__(self, threads: int) -> None:
        """Takes the number of handler threads."""
        self._threads = threads
        self._looked_at = time.monotonic()
        self._handled = 0
        self._ahead = 0

    def rows(self, handled: int) -> int:
        """Returns how many rows will be handled in the next `LOOKAHEAD` seconds, up to `MAX_AHEAD`.

        Args:
            handled: how many have been handled so far.
        """
        now = time.monotonic()
        elapsed = now - self._looked_at
        has_seen_all = handled - self._handled >= self._threads and elapsed > LOOKAHEAD / 10
        if has_seen_all or elapsed > LOOKAHEAD / 2:
            self._ahead = max(0, min(MAX_AHEAD, int((handled - self._handled) / elapsed * LOOKAHEAD)))
            self._looked_at, self._handled = now, handled
        return self._ahead
