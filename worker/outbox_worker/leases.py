"""Renews the leases of the rows that a worker holds."""

from collections.abc import Collection, Sequence

from outbox.queries import query
from outbox.row import named
from outbox.rq_jobs import Delivery, columns
from outbox.runtime import logs
from outbox.runtime.batches import BatchSize, write_bisecting
from outbox.runtime.postgres import Connection
from outbox.runtime.redaction import one_line
from outbox_worker.in_flight import InFlight

MAX_RENEWED = 10_000
"""Upper bound of rows in one statement; lowered when a statement takes too long. By default a worker holds fewer."""


class Leases:
    """Renews the leases of all rows in flight. Used by the completer's thread alone.

    A lease is renewed until the row's outcome is written, however long its handler takes: while this worker lives and
    reaches Postgres, no other worker begins the row.
    """

    def __init__(self, in_flight: InFlight, worker: str, seconds: float) -> None:
        """Begins with no missed or refused leases.

        Args:
            in_flight: the rows that the worker holds.
            worker: the name that they are claimed in.
            seconds: length of a lease, from its renewal.
        """
        self._in_flight = in_flight
        self._worker = worker
        self._seconds = seconds
        self._size = BatchSize(MAX_RENEWED)
        self._missed: set[Delivery] = set()
        """Rows that the last renewal missed: another session has them locked, or they were taken from this worker."""
        self._refused: set[Delivery] = set()
        """Rows whose renewal Postgres has refused, because of a trigger for example, and that are logged."""

    def renew(self, connection: Connection) -> bool:
        """Renews all leases and returns whether there are any."""
        held = self._in_flight.deliveries()
        self._refused.intersection_update(held)
        self._renew(connection, held)
        return bool(held)

    def renew_missed(self, connection: Connection) -> None:
        """Renews the leases that the last renewal missed; the next renewal of all leases may be too late for them."""
        if self._missed:
            self._renew(connection, self._missed.intersection(self._in_flight.deliveries()))

    def _renew(self, connection: Connection, deliveries: Collection[Delivery]) -> None:
        self._missed = set(deliveries)
        cursor = connection.cursor(row_factory=named(Delivery))

        def renew(batch: Sequence[Delivery]) -> None:
            cursor.execute(query("renew_leases"), {**columns(batch), "lease": self._seconds, "worker": self._worker})
            self._missed.difference_update(cursor)

        waiting = list(deliveries)
        refused: dict[Delivery, Exception] = {}
        while waiting:
            with self._size.trial(len(waiting)) as rows:
                refused.update(write_bisecting(waiting[:rows], renew))
            del waiting[:rows]
        self._missed -= refused.keys()  # they are tried again at the next renewal of all leases
        if new := refused.keys() - self._refused:
            row_ids, error = sorted(delivery.row_id for delivery in new), next(iter(refused.values()))
            logs.get().error("leases cannot be renewed", rows=row_ids, error=one_line(error))
            self._refused |= new
