"""Counts frequent events, so that each kind of them is logged once a minute."""

import time
from threading import Lock

LOG_INTERVAL = 60.0
"""Seconds between two log lines of one kind."""
MAX_KINDS = 1000
"""Number of kinds at which all are forgotten: another client may control a part of a kind, and create any number."""


class Tally:
    """Counts the events of each kind since its last log line. Safe to share between threads."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, ...], tuple[float, int]] = {}
        """By kind: the time of its last log line, and the number of events since."""
        self._lock = Lock()

    def count(self, *kind: str) -> int:
        """Counts an event. Returns the number of events to log now; 0 means that no line is due."""
        now = time.monotonic()
        with self._lock:
            if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            logged_at, times = self._kinds.get(kind, (now - LOG_INTERVAL, 0))
            is_due = now - logged_at >= LOG_INTERVAL
            self._kinds[kind] = (now, 0) if is_due else (logged_at, times + 1)
            return times + 1 if is_due else 0
