"""The leases of what a worker runs, and their renewal."""

import time
from collections.abc import Collection, Iterable
from threading import Lock

from psycopg.rows import tuple_row

from outbox.jobs import Delivery
from outbox.postgres import Connection
from outbox.queries import query
from worker.claim import Claim

OVERTIME = 5.0
"""Seconds past its time limit after which an attempt is no longer believed to end, and its lease is let go."""


class Leases:
    """The rows that a worker holds. Safe to share between threads."""

    def __init__(self, seconds: float, overtime: float = OVERTIME) -> None:
        """Holds nothing yet.

        Args:
            seconds: that a renewal is good for.
            overtime: seconds past its time limit for which an attempt's lease is kept.
        """
        self.seconds = seconds
        self._overtime = overtime
        self._held: dict[Delivery, float] = {}
        self._lock = Lock()
        self._missed: set[Delivery] = set()
        """What the last renewal has passed over: somebody has the row locked, or it is no longer ours."""

    def hold(self, claims: Iterable[Claim]) -> None:
        """Begins to renew the leases of these rows, until they are let go or overrun their time."""
        now = time.monotonic()
        with self._lock:
            self._held.update({claimed.delivery: now + claimed.timeout + self._overtime for claimed in claims})

    def let_go(self, deliveries: Iterable[Delivery]) -> None:
        """Ends that: their outcome is written, or they are no longer ours."""
        with self._lock:
            for delivery in deliveries:
                self._held.pop(delivery, None)

    def held(self) -> list[Delivery]:
        """Returns all that have not been let go."""
        with self._lock:
            return list(self._held)

    def overrun(self, deliveries: Iterable[Delivery]) -> int:
        """Returns how many of these have overrun their time."""
        now = time.monotonic()
        with self._lock:
            return sum(self._held.get(delivery, now) < now for delivery in deliveries)

    def renew(self, connection: Connection) -> bool:
        """Renews all leases but those of attempts that have overrun their time; returns whether there are any."""
        return self._renew(connection, self._living())

    def renew_missed(self, connection: Connection) -> None:
        """Renews what the last renewal has passed over.

        At once, and not when it is all leases' turn: that may be too late for a row that somebody had locked.
        """
        if self._missed:
            self._renew(connection, self._missed.intersection(self._living()))

    def _living(self) -> list[Delivery]:
        now = time.monotonic()
        with self._lock:
            return [delivery for delivery, ends in self._held.items() if ends > now]

    def _renew(self, connection: Connection, deliveries: Collection[Delivery]) -> bool:
        self._missed = set(deliveries)
        if not deliveries:
            return False
        cursor = connection.cursor(row_factory=tuple_row)
        cursor.execute(query("renew_leases"), {**columns(deliveries), "lease": self.seconds})
        self._missed.difference_update(Delivery(*renewed) for renewed in cursor)
        return True


def columns(deliveries: Collection[Delivery]) -> dict[str, list[int]]:
    """Returns deliveries as statements take them."""
    return {
        "ids": [delivery.row for delivery in deliveries],
        "deliveries": [delivery.number for delivery in deliveries],
    }
