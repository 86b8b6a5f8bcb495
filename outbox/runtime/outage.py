"""Outages of a server: one log line at the start and one at the end, with backoff in between."""

import time
from threading import Lock

from outbox.backoff import reconnect_delay
from outbox.runtime import logs
from outbox.runtime.redaction import one_line


class Outage:
    """The state of one server as a process sees it: away or not. Safe to share between threads."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._failures = 0
        self._since = 0.0
        self._lock = Lock()

    def away(self, error: Exception) -> float:
        """Records a failure; logs the first one of an outage. Returns the seconds until the next try."""
        with self._lock:
            self._failures += 1
            if self._failures == 1:
                self._since = time.monotonic()
                logs.get().warning(f"{self._server} is away", error=one_line(error))
            return reconnect_delay(self._failures)

    def back(self) -> bool:
        """Records a success; logs the one that ends an outage, and returns whether it did."""
        if not self._failures:
            return False
        with self._lock:
            if not self._failures:
                return False
            self._failures = 0
            logs.get().info(f"{self._server} is back", seconds=round(time.monotonic() - self._since, 3))
            return True
