"""Writes outcomes to their rows in batches, and keeps those that cannot be written now."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import psycopg
from psycopg import Cursor

from outbox.queries import query
from outbox.row import Status, named
from outbox.rq_jobs import Delivery, columns
from outbox.runtime import logs
from outbox.runtime.batches import BatchSize, write_bisecting
from outbox.runtime.postgres import Connection
from outbox.runtime.redaction import one_line
from outbox_worker.in_flight import InFlight
from outbox_worker.outcome import Outcome

BATCH = 1000
"""Upper bound of outcomes in one statement."""

UNSTORABLE = "the text of the error cannot be stored"
"""The error of an outcome whose own error text cannot be encoded or is refused by Postgres."""


class _NotWritten(NamedTuple):
    """A row of the statement `not_completed`: an outcome that was not written."""

    id: int
    delivery: int
    status: str


class Outcomes:
    """Outcomes that are not written yet. Used by the completer's thread alone.

    Each is ready, or waits for a lock on its row, or was refused by Postgres. A row is released when its outcome is
    written, or when it was taken from this worker.
    """

    def __init__(self, in_flight: InFlight, worker: str) -> None:
        """Begins without outcomes.

        Args:
            in_flight: the rows that the worker holds.
            worker: the name that they are claimed in.
        """
        self._in_flight = in_flight
        self._worker = worker
        self._size = BatchSize(BATCH)
        self._ready: dict[Delivery, Outcome] = {}
        """The latest outcome of each row: a handler may end after its row was given up."""
        self._locked: dict[Delivery, Outcome] = {}
        """Outcomes whose rows another session had locked at the last try."""
        self._refused: dict[Delivery, Outcome] = {}
        """Outcomes that Postgres refuses each by itself, because of a trigger for example."""
        self._logged: set[Delivery] = set()
        """Locked rows that are logged."""
        self._unanswered: set[Delivery] = set()
        """Rows whose outcome was sent and got no answer: it may be written."""

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Adds outcomes that are ready to be written."""
        self._ready.update((outcome.delivery, outcome) for outcome in outcomes)

    @property
    def ready(self) -> int:
        """How many outcomes are ready to be written."""
        return len(self._ready)

    @property
    def kept(self) -> int:
        """How many outcomes are ready or wait for a lock."""
        return len(self._ready) + len(self._locked)

    @property
    def refused(self) -> list[Delivery]:
        """The rows whose outcomes Postgres refuses."""
        return sorted(self._refused)

    def retry_refused(self) -> None:
        """Makes refused outcomes ready; a newer outcome of the same row replaces the refused one."""
        self._ready = {**self._refused, **self._ready}

    def retry_locked(self) -> None:
        """Makes outcomes of locked rows ready, ahead of others; a newer outcome of the same row replaces the old."""
        self._ready, self._locked = {**self._locked, **self._ready}, {}

    def write(self, connection: Connection) -> None:
        """Writes a batch of ready outcomes.

        Raises:
            psycopg.Error: Postgres is away, or refuses for a reason that is not in the rows; the outcomes are kept.
        """
        cursor = connection.cursor(row_factory=named(Delivery))

        def write(outcomes: Sequence[Outcome]) -> None:
            self._write(cursor, outcomes)

        with self._size.trial(len(self._ready)) as rows:
            refused = write_bisecting(list(islice(self._ready.values(), rows)), write)
        if texts := [outcome for outcome, error in refused if _is_about_text(outcome, error)]:
            refused = [(outcome, error) for outcome, error in refused if outcome not in texts]
            refused += write_bisecting([outcome._replace(error=UNSTORABLE) for outcome in texts], write)
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
            self._settle_unwritten(cursor, [outcome for outcome in outcomes if outcome.delivery not in written])

    def _release(self, deliveries: set[Delivery]) -> None:
        self._in_flight.release(deliveries)
        for delivery in deliveries:
            self._ready.pop(delivery, None)
        # Nearly always empty: without this check, each of these costs as much as the dictionary above.
        if self._logged or self._unanswered or self._refused:
            self._logged -= deliveries
            self._unanswered -= deliveries
            self._refused = {delivery: kept for delivery, kept in self._refused.items() if delivery not in deliveries}

    def _settle_unwritten(self, cursor: Cursor[Delivery], outcomes: Sequence[Outcome]) -> None:
        """Puts off outcomes whose rows are locked, and drops those whose rows were taken from this worker.

        Does not log an outcome that an earlier statement without an answer has written.
        """
        rows = cursor.connection.cursor(row_factory=named(_NotWritten)).execute(
            query("not_completed"), {**columns([outcome.delivery for outcome in outcomes]), "worker": self._worker}
        )
        statuses = {Delivery(row.id, row.delivery): row.status for row in rows}
        locked = {outcome.delivery: outcome for outcome in outcomes if statuses.get(outcome.delivery) == Status.RUNNING}
        self._locked |= locked
        for delivery in locked:
            self._ready.pop(delivery, None)
        if new := locked.keys() - self._logged:
            logs.get().warning("outcomes wait for a lock", rows=sorted(delivery.row_id for delivery in new))
            self._logged |= new
        settled = [outcome for outcome in outcomes if outcome.delivery not in locked]
        for outcome in settled:
            if outcome.attempts is None:
                continue  # the row may never have been claimed
            if outcome.delivery not in self._unanswered:
                why = "the row was taken from this worker"
            elif statuses.get(outcome.delivery) == outcome.status:
                continue
            else:
                why = "an earlier write got no answer, and the row has changed since"
            logs.get().warning(
                "dropped outcome",
                row=outcome.delivery.row_id,
                delivery=outcome.delivery.number,
                status=outcome.status,
                why=why,
            )
        self._release({outcome.delivery for outcome in settled})

    def _refuse(self, refused: Mapping[Outcome, Exception]) -> None:
        """Keeps refused outcomes, and with them the leases: Postgres would refuse another worker's outcomes too."""
        by_delivery = {outcome.delivery: outcome for outcome in refused}
        if new := by_delivery.keys() - self._refused.keys():
            row_ids, error = sorted(delivery.row_id for delivery in new), next(iter(refused.values()))
            logs.get().error("outcomes cannot be written", rows=row_ids, error=one_line(error))
        self._refused |= by_delivery
        for delivery in by_delivery:
            self._ready.pop(delivery, None)


def _is_about_text(outcome: Outcome, error: Exception) -> bool:
    return outcome.error is not None and isinstance(error, (psycopg.DataError, UnicodeError))
