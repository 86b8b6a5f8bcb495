"""Marking: writes the outcomes of attempts, and renews leases."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

import psycopg
from psycopg import Cursor
from psycopg.rows import tuple_row

from outbox import logs, postgres
from outbox.backoff import reconnect_delay
from outbox.batch import BatchSize
from outbox.halving import write_by_halves
from outbox.jobs import Delivery
from outbox.outage import one_line
from outbox.postgres import Connection
from outbox.queries import query
from worker.attempt import Outcome
from worker.errors import NoThreadsError, ThreadEndedError
from worker.leases import Leases, columns

_BATCH = 1000
_GATHERING = 0.005
"""Seconds between two writes on a busy system: each costs Postgres a commit, and the handlers the interpreter."""
_PAUSE = 0.05
"""Seconds between two writes that wait for a lock of the whole table: such a wait may end at once."""
_LOOK = 0.2
"""Seconds between two tries at rows that somebody else has locked, and between two looks whether to end."""

SHORTEST_ANSWER_LIMIT = 5.0
"""Seconds that a statement may take, however short the lease: a busy Postgres is not away."""

UNSTORABLE = "the text of the error cannot be stored"
"""The error of an outcome whose own text Postgres, or its encoding, refuses."""

MOST_REFUSED = 100
"""Outcomes that Postgres refuses, one by one, at which the worker takes no more rows: it is hardly the rows' fault."""


class Marker:
    """A thread with a connection of its own that writes outcomes in batches and keeps the leases of what runs.

    While Postgres is away it keeps the outcomes and writes them when it is back; if a row was handed over again
    meanwhile, the fence decides, and the late outcome is dropped.
    """

    def __init__(
        self,
        database_url: str,
        leases: Leases,
        *,
        pooled: bool = False,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes the thread.

        Args:
            database_url: where to.
            leases: of the rows whose outcomes will come; what is written is let go.
            pooled: whether that leads through a pooler in transaction mode.
            on_end: called in the thread should it end without having been asked to.
        """
        self._database_url = database_url
        self._pooled = pooled
        self.leases = leases
        self._on_end = on_end
        self._failures = 0
        self._size = BatchSize(_BATCH)
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._unwritten: dict[Delivery, Outcome] = {}
        """The latest of each row: a handler may have ended after all when its row was already given back."""
        self._locked: dict[Delivery, Outcome] = {}
        """Outcomes whose rows somebody else had locked at the last try."""
        self._refused: dict[Delivery, Outcome] = {}
        """Outcomes that Postgres refuses for a reason of its own, a trigger for one; tried again with each renewal."""
        self._told: set[Delivery] = set()
        """The rows of those that the log has named."""
        self._unanswered: set[Delivery] = set()
        """Rows whose outcome was sent, and no answer came: it may have been written."""
        self._closing = Event()
        self._connected = Event()
        self._is_blocked = False
        """Whether the last statement was refused for what is no row's fault: a lock of the whole table, a full disk."""
        self._asked_at: float | None = None
        """When the statements began that have not been answered."""
        self._thread = Thread(target=self._run, name="marker", daemon=True)
        self._is_started = False
        self._failure: BaseException | None = None
        """What has ended the thread."""

    def start(self) -> None:
        """Starts the thread, unless it was started before.

        Raises:
            NoThreadsError: the system lets this process start none.
        """
        if not self._is_started:
            try:
                self._thread.start()
            except RuntimeError as error:
                raise NoThreadsError(f"no thread can be started to mark rows: {one_line(error)}") from error
            self._is_started = True

    def check(self) -> None:
        """Checks that the thread lives, if it was started: without it, nothing is marked and no lease is renewed.

        Raises:
            ThreadEndedError: it has ended.
        """
        if self._failure is not None:
            raise ThreadEndedError(
                f"the thread that marks rows ended ({one_line(self._failure)}): start another worker"
            ) from self._failure

    def put(self, outcome: Outcome) -> None:
        """Takes an outcome; it is written at once on a quiet system, and in batches on a busy one."""
        self._outcomes.put(outcome)

    def is_healthy(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds until outcomes can be written and leases renewed, and returns whether they can.

        As far as is known: a Postgres that has not answered for a third of a lease may let the leases run out.
        """
        deadline = time.monotonic() + timeout
        while not (self._connected.wait(max(0.0, deadline - time.monotonic())) and self._is_writing()):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True

    def _is_writing(self) -> bool:
        asked_at = self._asked_at
        is_answered = asked_at is None or time.monotonic() - asked_at < self.leases.seconds / 3
        return is_answered and not self._is_blocked and len(self._refused) < MOST_REFUSED

    def close(self, timeout: float) -> list[Delivery]:
        """Writes what is there and ends the thread, in `timeout` seconds; returns what could not be written by then."""
        self._closing.set()
        if self._is_started:
            self._thread.join(timeout)
        is_done = not self._thread.is_alive() and self._failure is None
        return sorted(self._refused) if is_done else sorted(self.leases.held())

    def _run(self) -> None:
        try:
            self._write_until_closed()
        except BaseException as error:  # noqa: BLE001 - whatever ends this thread ends the worker
            self._failure = error
            self._on_end()
        finally:
            self._connected.clear()

    def _write_until_closed(self) -> None:
        while not self._is_over():
            try:
                with postgres.connect(
                    self._database_url,
                    "outbox worker marks",
                    pooled=self._pooled,
                    answer_limit=min(postgres.ANSWER_LIMIT, max(SHORTEST_ANSWER_LIMIT, self.leases.seconds / 3)),
                ) as connection:
                    if not self._pooled:
                        connection.execute(query("limit_lock_wait"))
                    self._serve(connection)
                    return
            except postgres.AWAY as error:
                if self._failures == 0:
                    logs.get().warning("marks wait for Postgres", error=one_line(error), unwritten=self._kept())
            except Exception as error:  # noqa: BLE001 - short of memory, say: it may pass, and outcomes are kept
                if self._failures == 0:
                    logs.get().error("marks failed", error=one_line(error), exc_info=error)
            self._connected.clear()
            self._failures += 1
            time.sleep(reconnect_delay(self._failures))

    def _kept(self) -> int:
        return len(self._unwritten) + len(self._locked)

    def _is_over(self) -> bool:
        return self._closing.is_set() and not self._kept() and self._outcomes.empty()

    def _serve(self, connection: Connection) -> None:
        renew_at = try_again_at = 0.0
        while not self._is_over():
            now = time.monotonic()
            try:
                if now >= renew_at:
                    self._renew(connection)
                    renew_at = now + self.leases.seconds / 3
                    self._unwritten = {**self._refused, **self._unwritten}
                if now >= try_again_at:
                    self._unwritten, self._locked = {**self._locked, **self._unwritten}, {}
                    with self._asking():
                        self.leases.renew_missed(connection)
                    try_again_at = now + _LOOK
                if not self._unwritten:
                    self._collect(min(max(renew_at - time.monotonic(), 0.001), _LOOK))
                if self._unwritten:
                    is_alone = len(self._unwritten) == 1
                    self._write(connection)
                    if not is_alone and not self._closing.is_set():
                        time.sleep(_GATHERING)
                self._is_blocked = False
                self._connected.set()  # not before: what lets us in may refuse to write
            except postgres.AWAY as error:
                if postgres.is_outage(error) or connection.closed:
                    raise
                self._wait_refused(error)

    def _wait_refused(self, error: psycopg.Error) -> None:
        is_lock = isinstance(error, psycopg.errors.LockNotAvailable)
        if not self._is_blocked and is_lock:  # of the whole table: single rows are passed over
            logs.get().warning("marks wait for a lock", rows="all")
        elif not self._is_blocked:
            logs.get().warning("marks refused", error=one_line(error), unwritten=self._kept())
        self._is_blocked = True
        time.sleep(_PAUSE if is_lock else _LOOK)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        self._asked_at = time.monotonic()
        try:
            yield
        finally:
            self._asked_at = None

    def _collect(self, timeout: float) -> None:
        with suppress(Empty):
            outcome = self._outcomes.get(timeout=timeout)
            self._unwritten[outcome.delivery] = outcome
            while len(self._unwritten) < _BATCH:
                outcome = self._outcomes.get_nowait()
                self._unwritten[outcome.delivery] = outcome

    def _renew(self, connection: Connection) -> None:
        with self._asking():
            has_asked = self.leases.renew(connection)
        if has_asked and not self._unwritten:
            self._failures = 0

    def _write(self, connection: Connection) -> None:
        cursor = connection.cursor(row_factory=tuple_row)

        def write(outcomes: Sequence[Outcome]) -> None:
            self._write_batch(cursor, outcomes)

        with self._asking():
            with self._size.trial(len(self._unwritten)) as rows:
                refused = write_by_halves(list(islice(self._unwritten.values(), rows)), write)
            if texts := [outcome for outcome, error in refused if _is_about_text(outcome, error)]:
                refused = [(outcome, error) for outcome, error in refused if outcome not in texts]
                refused += write_by_halves([outcome._replace(error=UNSTORABLE) for outcome in texts], write)
        if refused:
            self._refuse(dict(refused))

    def _write_batch(self, cursor: Cursor[tuple[Any, ...]], outcomes: Sequence[Outcome]) -> None:
        deliveries = [outcome.delivery for outcome in outcomes]
        try:
            cursor.execute(
                query("mark"),
                {
                    **columns(deliveries),
                    "worker": self.leases.worker,
                    "statuses": [outcome.status for outcome in outcomes],
                    "delays": [float(outcome.delay) for outcome in outcomes],
                    "attempts": [outcome.attempts for outcome in outcomes],
                    "errors": [outcome.error for outcome in outcomes],
                    "unhandled": [outcome.delivery.row for outcome in outcomes if outcome.unhandled],
                },
            )
        except Exception as error:
            if cursor.connection.closed or not isinstance(error, psycopg.Error):
                self._unanswered.update(deliveries)
            raise
        written = {Delivery(*row) for row in cursor}
        self._failures = 0
        self._settle(written)
        if len(written) < len(outcomes):
            self._sort_out(cursor, [outcome for outcome in outcomes if outcome.delivery not in written])

    def _settle(self, deliveries: set[Delivery]) -> None:
        """Forgets rows whose outcome is written, or no longer ours to write."""
        self.leases.let_go(deliveries)
        for delivery in deliveries:
            self._unwritten.pop(delivery, None)
        # Nearly always empty, and each look for a row in them costs as much as one in the others.
        if self._told or self._unanswered or self._refused:
            self._told -= deliveries
            self._unanswered -= deliveries
            self._refused = {delivery: kept for delivery, kept in self._refused.items() if delivery not in deliveries}

    def _sort_out(self, cursor: Cursor[tuple[Any, ...]], outcomes: Sequence[Outcome]) -> None:
        """Puts off what could not be written because somebody has the row locked, and drops what is no longer ours.

        What an earlier try has written, though its answer was lost, is neither.
        """
        found = cursor.execute(
            query("unmarked"), {**columns([outcome.delivery for outcome in outcomes]), "worker": self.leases.worker}
        )
        statuses = {Delivery(row, number): status for row, number, status in found}
        locked = {outcome.delivery: outcome for outcome in outcomes if statuses.get(outcome.delivery) == "running"}
        self._locked |= locked
        for delivery in locked:
            self._unwritten.pop(delivery, None)
        if untold := locked.keys() - self._told:
            logs.get().warning("marks wait for a lock", rows=sorted(delivery.row for delivery in untold))
            self._told |= untold
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
                row=outcome.delivery.row,
                delivery=outcome.delivery.number,
                status=outcome.status,
                why=why,
            )
        self._settle({outcome.delivery for outcome in over})

    def _refuse(self, refused: Mapping[Outcome, Exception]) -> None:
        """Keeps outcomes, and the rows' leases: given to another worker, the rows would be done again in vain."""
        by_delivery = {outcome.delivery: outcome for outcome in refused}
        if new := by_delivery.keys() - self._refused.keys():
            rows, error = sorted(delivery.row for delivery in new), next(iter(refused.values()))
            logs.get().error("outcomes cannot be written", rows=rows, error=one_line(error))
        self._refused |= by_delivery
        for delivery in by_delivery:
            self._unwritten.pop(delivery, None)


def _is_about_text(outcome: Outcome, error: Exception) -> bool:
    return outcome.error is not None and isinstance(error, (psycopg.DataError, UnicodeError))
