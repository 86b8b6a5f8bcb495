"""Counts of events that may come by the thousand and get one log line a minute."""

import time
from threading import Lock

LOG_INTERVAL = 60.0
"""Seconds between two lines of one kind."""
MAX_KINDS = 1000
"""Kinds at which all are forgotten: a kind may contain text that another client has made up."""


class Tally:
    """How often events of each kind have happened since their last log line. Safe to share between threads."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, ...], tuple[float, int]] = {}
        """When the last line is from, and how many events have come since."""
        self._lock = Lock()

    def count(self, *kind: str) -> int:
        """Counts one event, and returns how many of its kind the log is to report now: 0 for none."""
        now = time.monotonic()
        with self._lock:
            if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            told_at, times = self._kinds.get(kind, (now - LOG_INTERVAL, 0))
            is_told = now - told_at >= LOG_INTERVAL
            self._kinds[kind] = (now, 0) if is_told else (told_at, times + 1)
            return times + 1 if is_told else 0
