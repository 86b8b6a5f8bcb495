"""The leases of the rows that a worker holds, and their renewal."""

from collections.abc import Collection, Iterable, Sequence
from threading import Lock

from psycopg.rows import tuple_row

from outbox import logs
from outbox.batch import BatchSize
from outbox.halving import write_by_halves
from outbox.jobs import Delivery
from outbox.outage import one_line
from outbox.postgres import Connection
from outbox.queries import query
from worker.claim import Claim

MOST_RENEWED = 10_000
"""Rows in one renewal, unless it was cut for the time that it took; more than a worker holds by default."""


class Leases:
    """The rows that a worker holds. Safe to share between threads.

    A row is held until its outcome is written, however long its handler takes: while this worker lives and reaches
    Postgres, no other begins the row.
    """

    def __init__(self, seconds: float, worker: str) -> None:
        """Holds nothing yet.

        Args:
            seconds: that a renewal is good for.
            worker: the name that the rows are claimed in.
        """
        self.seconds = seconds
        self.worker = worker
        self._held: set[Delivery] = set()
        self._lock = Lock()
        self._size = BatchSize(MOST_RENEWED)
        self._missed: set[Delivery] = set()
        """What the last renewal has passed over: somebody has the row locked, or it is no longer ours."""
        self._refused: set[Delivery] = set()
        """Rows whose renewal Postgres has refused, as by a trigger, and the log has named."""

    def hold(self, claims: Iterable[Claim]) -> None:
        """Begins to renew the leases of these rows, until they are let go."""
        with self._lock:
            self._held.update(claimed.delivery for claimed in claims)

    def let_go(self, deliveries: Iterable[Delivery]) -> None:
        """Ends that: their outcome is written, or they are no longer ours."""
        with self._lock:
            self._held.difference_update(deliveries)
            self._refused &= self._held

    def held(self) -> set[Delivery]:
        """Returns all that have not been let go."""
        with self._lock:
            return set(self._held)

    def renew(self, connection: Connection) -> bool:
        """Renews all leases, and returns whether there are any."""
        return self._renew(connection, self.held())

    def renew_missed(self, connection: Connection) -> None:
        """Renews what the last renewal has passed over.

        At once, and not when it is all leases' turn: that may be too late for a row that somebody had locked.
        """
        if self._missed:
            self._renew(connection, self._missed & self.held())

    def _renew(self, connection: Connection, deliveries: Collection[Delivery]) -> bool:
        self._missed = set(deliveries)
        if not deliveries:
            return False
        cursor = connection.cursor(row_factory=tuple_row)

        def renew(some: Sequence[Delivery]) -> None:
            cursor.execute(query("renew_leases"), {**columns(some), "lease": self.seconds, "worker": self.worker})
            self._missed.difference_update(Delivery(*renewed) for renewed in cursor)

        waiting = list(deliveries)
        refused: dict[Delivery, Exception] = {}
        while waiting:
            with self._size.trial(len(waiting)) as most:
                refused.update(write_by_halves(waiting[:most], renew))
            del waiting[:most]
        self._missed -= refused.keys()  # their turn comes with the next renewal of all
        if new := refused.keys() - self._refused:
            rows, error = sorted(delivery.row for delivery in new), next(iter(refused.values()))
            logs.get().error("leases cannot be renewed", rows=rows, error=one_line(error))
            self._refused |= new
        return True


def columns(deliveries: Collection[Delivery]) -> dict[str, list[int]]:
    """Returns deliveries as statements take them."""
    return {
        "ids": [delivery.row for delivery in deliveries],
        "deliveries": [delivery.number for delivery in deliveries],
    }
