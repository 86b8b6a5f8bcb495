"""Completes rows in a thread: writes the outcomes of attempts and renews leases."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

import psycopg

from outbox.backoff import reconnect_delay
from outbox.queries import query
from outbox.rq_jobs import Delivery
from outbox.runtime import logs, postgres
from outbox.runtime.postgres import Connection
from outbox.runtime.redaction import one_line
from outbox_worker.errors import NoThreadsError, ThreadEndedError
from outbox_worker.in_flight import InFlight
from outbox_worker.leases import Leases
from outbox_worker.outcomes import Outcomes

_GATHER_TIME = 0.005
"""Seconds between two writes under load: each costs Postgres a commit and takes the interpreter from handlers."""
_LOCK_RETRY_INTERVAL = 0.05
"""Seconds between two tries while the whole table is locked: such a lock may be short."""
_RETRY_INTERVAL = 0.2
"""Seconds between two tries at rows that another session has locked, and between two checks whether to end."""

SHORTEST_ANSWER_LIMIT = 5.0
"""Seconds that a statement may take, however short the lease: a busy Postgres is not away."""

MAX_REFUSED = 100
"""Outcomes refused each by itself at which the worker takes no more rows: so many are hardly the fault of the rows."""


class Completer:
    """A thread with a connection of its own that writes outcomes in batches and renews the leases of rows in flight.

    While Postgres is away, the completer keeps outcomes. It writes them when Postgres is back, and drops the outcome of
    a row that has been handed over again: the fence decides.
    """

    def __init__(
        self,
        database_url: str,
        in_flight: InFlight,
        worker: str,
        lease: float,
        *,
        pooled: bool = False,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Creates the thread; `start` starts it.

        Args:
            database_url: of the database with the rows.
            in_flight: the rows that the worker holds.
            worker: the name that they are claimed in.
            lease: seconds of a lease.
            pooled: whether the URL leads through a pooler in transaction mode.
            on_failure: called in the thread if an error ends it.
        """
        self._database_url = database_url
        self.in_flight = in_flight
        self._lease = lease
        self._pooled = pooled
        self._on_failure = on_failure
        self._leases = Leases(in_flight, worker, lease)
        self._outcomes = Outcomes(in_flight, worker)
        self._failures = 0
        """Consecutive failures; only the first is logged."""
        self._closing = Event()
        self._connected = Event()
        self._is_blocked = False
        """Whether the last statement was refused for a reason that is not in the rows: a locked table, a full disk."""
        self._asked_at: float | None = None
        """When the statements were begun that have no answer yet; None if there are none."""
        self._thread = Thread(target=self._run, name="completer", daemon=True)
        self._is_started = False
        self._failure: BaseException | None = None
        """The error that ended the thread."""

    def start(self) -> None:
        """Starts the thread, unless it was started before.

        Raises:
            NoThreadsError: the system refuses another thread.
        """
        if not self._is_started:
            try:
                self._thread.start()
            except RuntimeError as error:
                raise NoThreadsError(f"no thread can be started to write outcomes: {one_line(error)}") from error
            self._is_started = True

    def check(self) -> None:
        """Checks that no error has ended the thread: without it, no row is completed and no lease is renewed.

        Raises:
            ThreadEndedError: an error has ended the thread.
        """
        if self._failure is not None:
            raise ThreadEndedError(
                f"the thread that writes outcomes ended ({one_line(self._failure)}): start another worker"
            ) from self._failure

    def is_healthy(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds until outcomes can be written and leases renewed, and returns whether they can.

        They cannot if Postgres has not answered for a third of a lease: leases may pass.
        """
        deadline = time.monotonic() + timeout
        while not (self._connected.wait(max(0.0, deadline - time.monotonic())) and self._is_writing()):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True

    def _is_writing(self) -> bool:
        asked_at = self._asked_at
        is_answered = asked_at is None or time.monotonic() - asked_at < self._lease / 3
        return is_answered and not self._is_blocked and len(self._outcomes.refused) < MAX_REFUSED

    def close(self, timeout: float) -> list[Delivery]:
        """Writes all outcomes and ends the thread within `timeout` seconds; returns the rows that were not written."""
        self._closing.set()
        if self._is_started:
            self._thread.join(timeout)
        is_done = not self._thread.is_alive() and self._failure is None
        return self._outcomes.refused if is_done else sorted(self.in_flight.deliveries())

    def _run(self) -> None:
        try:
            self._write_until_closed()
        except BaseException as error:  # noqa: BLE001 - any error that ends this thread ends the worker
            self._failure = error
            self._on_failure()
        finally:
            self._connected.clear()

    def _write_until_closed(self) -> None:
        while not self._is_over():
            try:
                with postgres.connect(
                    self._database_url,
                    "outbox worker outcomes",
                    pooled=self._pooled,
                    answer_limit=min(postgres.ANSWER_LIMIT, max(SHORTEST_ANSWER_LIMIT, self._lease / 3)),
                ) as connection:
                    if not self._pooled:
                        connection.execute(query("limit_session_lock_wait"))
                    self._serve(connection)
                    return
            except postgres.AWAY as error:
                if self._failures == 0:
                    kept = self._outcomes.kept
                    logs.get().warning("outcomes wait for Postgres", error=one_line(error), unwritten=kept)
            except Exception as error:  # noqa: BLE001 - out of memory for example: it may pass, and outcomes are kept
                if self._failures == 0:
                    logs.get().error("writing outcomes failed", error=one_line(error), exc_info=error)
            self._connected.clear()
            self._failures += 1
            time.sleep(reconnect_delay(self._failures))

    def _is_over(self) -> bool:
        return self._closing.is_set() and not self._outcomes.kept and not self.in_flight.has_outcomes

    def _serve(self, connection: Connection) -> None:
        renew_at = try_again_at = 0.0
        self._outcomes.add(self.in_flight.collect_again())  # an error may have come between collecting and adding
        while not self._is_over():
            now = time.monotonic()
            try:
                if now >= renew_at:
                    self._renew(connection)
                    renew_at = now + self._lease / 3
                    self._outcomes.retry_refused()
                if now >= try_again_at:
                    self._outcomes.retry_locked()
                    with self._awaiting_answer():
                        self._leases.renew_missed(connection)
                    try_again_at = now + _RETRY_INTERVAL
                idle_time = min(max(renew_at - time.monotonic(), 0.001), _RETRY_INTERVAL)
                self._outcomes.add(self.in_flight.collect(0.0 if self._outcomes.ready else idle_time))
                if self._outcomes.ready:
                    self._write(connection)
                self._is_blocked = False
                self._connected.set()  # not earlier: a server may accept the connection and refuse writes
            except postgres.AWAY as error:
                if postgres.loses_connection(error, connection):
                    raise
                self._wait_refused(error)

    def _renew(self, connection: Connection) -> None:
        with self._awaiting_answer():
            has_leases = self._leases.renew(connection)
        if has_leases and not self._outcomes.ready:
            self._failures = 0

    def _write(self, connection: Connection) -> None:
        is_single = self._outcomes.ready == 1
        with self._awaiting_answer():
            self._outcomes.write(connection)
        self._failures = 0
        if not is_single and not self._closing.is_set():
            time.sleep(_GATHER_TIME)

    def _wait_refused(self, error: psycopg.Error) -> None:
        is_lock = isinstance(error, psycopg.errors.LockNotAvailable)
        if not self._is_blocked and is_lock:  # the whole table is locked: statements skip single rows that are locked
            logs.get().warning("outcomes wait for a lock", rows="all")
        elif not self._is_blocked:
            logs.get().warning("outcomes refused", error=one_line(error), unwritten=self._outcomes.kept)
        self._is_blocked = True
        time.sleep(_LOCK_RETRY_INTERVAL if is_lock else _RETRY_INTERVAL)

    @contextmanager
    def _awaiting_answer(self) -> Iterator[None]:
        self._asked_at = time.monotonic()
        try:
            yield
        finally:
            self._asked_at = None
