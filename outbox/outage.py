"""A server that goes away and comes back: one log line each, and backoff between."""

import time
from threading import Lock

import psycopg

from outbox import logs
from outbox.backoff import reconnect_delay
from outbox.verification import masked


class Outage:
    """What a process knows of one server's absence. Safe to share between threads."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._failures = 0
        self._since = 0.0
        self._lock = Lock()

    def away(self, error: Exception) -> float:
        """Takes note of a failure, logs the first of a row, and returns the seconds to wait before the next try."""
        with self._lock:
            self._failures += 1
            if self._failures == 1:
                self._since = time.monotonic()
                logs.get().warning(f"{self._server} is away", error=one_line(error))
            return reconnect_delay(self._failures)

    def back(self) -> bool:
        """Takes note of a success, logs the first after a failure, and returns whether it was one."""
        if not self._failures:
            return False
        with self._lock:
            if not self._failures:
                return False
            self._failures = 0
            logs.get().info(f"{self._server} is back", seconds=round(time.monotonic() - self._since, 3))
            return True


def one_line(error: BaseException) -> str:
    """Returns an error's class and text on one line of at most 500 characters, all of which Postgres can store."""
    told = without_detail(error) if isinstance(error, psycopg.Error) else str(error)
    text = " ".join(masked(told).replace("\0", "\ufffd").encode(errors="replace").decode().split())
    name = type(error).__name__
    return (f"{name}: {text}" if text else name)[:500]


def without_detail(error: psycopg.Error) -> str:
    """Returns what Postgres says of an error, without the row that it quotes: there may be a password's hash in it."""
    return error.diag.message_primary or str(error)
