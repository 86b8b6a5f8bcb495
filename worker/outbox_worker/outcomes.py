"""Writing outcomes to their rows, in batches, and keeping those that cannot be written now."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import psycopg
from psycopg import Cursor

from outbox import logs
from outbox.batch import BatchSize
from outbox.halving import write_by_halves
from outbox.jobs import Delivery
from outbox.outage import one_line
from outbox.postgres import Connection
from outbox.queries import query
from outbox.row import Status, named
from outbox_worker.in_flight import InFlight
from outbox_worker.leases import columns
from outbox_worker.outcome import Outcome

BATCH = 1000
"""Outcomes in one statement, at most."""

UNSTORABLE = "the text of the error cannot be stored"
"""The error of an outcome whose own text Postgres, or its encoding, refuses."""


class _NotWritten(NamedTuple):
    """A row of the statement `not_completed`."""

    id: int
    delivery: int
    status: str


class Outcomes:
    """Outcomes that are not written yet. Used by the completer's thread alone.

    Each is ready, or waits for a lock on its row, or was refused by Postgres. A row whose outcome is written, or is no
    longer this worker's to write, is released.
    """

    def __init__(self, in_flight: InFlight, worker: str) -> None:
        """Takes the rows, and the name that they are claimed in."""
        self._in_flight = in_flight
        self._worker = worker
        self._size = BatchSize(BATCH)
        self._ready: dict[Delivery, Outcome] = {}
        """The latest of each row: a handler may have ended after all when its row was already given up."""
        self._locked: dict[Delivery, Outcome] = {}
        """Outcomes whose rows somebody else had locked at the last try."""
        self._refused: dict[Delivery, Outcome] = {}
        """Outcomes that Postgres refuses for a reason of its own, a trigger for one."""
        self._logged: set[Delivery] = set()
        """Locked rows that the log has named."""
        self._unanswered: set[Delivery] = set()
        """Rows whose outcome was sent, and no answer came: it may have been written."""

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Adds outcomes that are ready to be written."""
        self._ready.update((outcome.delivery, outcome) for outcome in outcomes)

    @property
    def ready(self) -> int:
        """How many may be written now."""
        return len(self._ready)

    @property
    def kept(self) -> int:
        """How many are not written, but for those that Postgres refuses."""
        return len(self._ready) + len(self._locked)

    @property
    def refused(self) -> list[Delivery]:
        """The rows of those that Postgres refuses."""
        return sorted(self._refused)

    def retry_refused(self) -> None:
        """Makes ready what Postgres has refused, unless the row has another outcome since."""
        self._ready = {**self._refused, **self._ready}

    def retry_locked(self) -> None:
        """Makes ready what somebody else had locked, before all that came since."""
        self._ready, self._locked = {**self._locked, **self._ready}, {}

    def write(self, connection: Connection) -> None:
        """Writes a batch of what is ready.

        Raises:
            psycopg.Error: Postgres is away, or refuses for what is no row's fault; all is kept.
        """
        cursor = connection.cursor(row_factory=named(Delivery))

        def write(outcomes: Sequence[Outcome]) -> None:
            self._write(cursor, outcomes)

        with self._size.trial(len(self._ready)) as rows:
            refused = write_by_halves(list(islice(self._ready.values(), rows)), write)
        if texts := [outcome for outcome, error in refused if _is_about_text(outcome, error)]:
            refused = [(outcome, error) for outcome, error in refused if outcome not in texts]
            refused += write_by_halves([outcome._replace(error=UNSTORABLE) for outcome in texts], write)
        if refused:
            self._refuse(dict(refused))

    def _write(self, cursor: Cursor[Delivery], outcomes: Sequence[Outcome]) -> None:
        deliveries = [outcome.delivery for outcome in outcomes]
        try:
            cursor.execute(
                query("complete"),
                {
                    **columns(deliveries),
                    "worker": self._worker,
                    "statuses": [outcome.status for outcome in outcomes],
                    "delays": [float(outcome.delay) for outcome in outcomes],
                    "attempts": [outcome.attempts for outcome in outcomes],
                    "errors": [outcome.error for outcome in outcomes],
                    "unhandled": [outcome.delivery.row_id for outcome in outcomes if outcome.unhandled],
                },
            )
        except Exception as error:
            if cursor.connection.closed or not isinstance(error, psycopg.Error):
                self._unanswered.update(deliveries)
            raise
        written = set(cursor)
        self._release(written)
        if len(written) < len(outcomes):
            self._sort_out(cursor, [outcome for outcome in outcomes if outcome.delivery not in written])

    def _release(self, deliveries: set[Delivery]) -> None:
        self._in_flight.release(deliveries)
        for delivery in deliveries:
            self._ready.pop(delivery, None)
        # Nearly always empty, and each look for a row in them costs as much as one in the others.
        if self._logged or self._unanswered or self._refused:
            self._logged -= deliveries
            self._unanswered -= deliveries
            self._refused = {delivery: kept for delivery, kept in self._refused.items() if delivery not in deliveries}

    def _sort_out(self, cursor: Cursor[Delivery], outcomes: Sequence[Outcome]) -> None:
        """Puts off what could not be written because somebody has the row locked, and drops what is no longer ours.

        What an earlier try has written, though its answer was lost, is neither.
        """
        found = cursor.connection.cursor(row_factory=named(_NotWritten)).execute(
            query("not_completed"), {**columns([outcome.delivery for outcome in outcomes]), "worker": self._worker}
        )
        statuses = {Delivery(row.id, row.delivery): row.status for row in found}
        locked = {outcome.delivery: outcome for outcome in outcomes if statuses.get(outcome.delivery) == Status.RUNNING}
        self._locked |= locked
        for delivery in locked:
            self._ready.pop(delivery, None)
        if new := locked.keys() - self._logged:
            logs.get().warning("outcomes wait for a lock", rows=sorted(delivery.row_id for delivery in new))
            self._logged |= new
        over = [outcome for outcome in outcomes if outcome.delivery not in locked]
        for outcome in over:
            if outcome.attempts is None:
                continue  # it may never have been claimed
            if outcome.delivery not in self._unanswered:
                why = "the row was taken from this worker meanwhile"
            elif statuses.get(outcome.delivery) == outcome.status:
                continue
            else:
                why = "an earlier write of it had no answer, and the row has gone on since"
            logs.get().warning(
                "dropped outcome",
                row=outcome.delivery.row_id,
                delivery=outcome.delivery.number,
                status=outcome.status,
                why=why,
            )
        self._release({outcome.delivery for outcome in over})

    def _refuse(self, refused: Mapping[Outcome, Exception]) -> None:
        """Keeps outcomes, and the rows' leases: given to another worker, the rows would be done again in vain."""
        by_delivery = {outcome.delivery: outcome for outcome in refused}
        if new := by_delivery.keys() - self._refused.keys():
            rows, error = sorted(delivery.row_id for delivery in new), next(iter(refused.values()))
            logs.get().error("outcomes cannot be written", rows=rows, error=one_line(error))
        self._refused |= by_delivery
        for delivery in by_delivery:
            self._ready.pop(delivery, None)


def _is_about_text(outcome: Outcome, error: Exception) -> bool:
    return outcome.error is not None and isinstance(error, (psycopg.DataError, UnicodeError))
