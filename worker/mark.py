"""Marking what became of attempts, and renewing leases: all that a worker writes besides its claims."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Event, Thread

import psycopg
from psycopg import Cursor
from psycopg.rows import tuple_row

from outbox import logs, postgres
from outbox.backoff import reconnect_delay
from outbox.jobs import Delivery
from outbox.outage import one_line
from outbox.postgres import Connection
from outbox.queries import query
from worker.attempt import Outcome
from worker.leases import Leases, columns

_BATCH = 1000
_GATHERING = 0.005
"""Seconds between two writes on a busy system: each costs Postgres a commit, and the handlers the interpreter."""
_LOOK = 0.2
"""Seconds between two tries at rows that somebody else has locked, and between two looks whether to end."""

SHORTEST_ANSWER_LIMIT = 5.0
"""Seconds that a statement may take, however short the lease: a busy Postgres is not away."""


class Marker:
    """A thread with a connection of its own that writes outcomes in batches and keeps the leases of what runs.

    While Postgres is away it keeps the outcomes and writes them when it is back; if a row was handed over again
    meanwhile, the fence decides, and the late outcome is dropped.
    """

    def __init__(self, database_url: str, leases: Leases, *, pooled: bool = False) -> None:
        """Makes the thread.

        Args:
            database_url: where to.
            leases: of the rows whose outcomes will come; what is written is let go.
            pooled: whether that leads through a pooler in transaction mode.
        """
        self._database_url = database_url
        self._pooled = pooled
        self.leases = leases
        self._failures = 0
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._unwritten: list[Outcome] = []
        self._locked: list[Outcome] = []
        """Outcomes whose rows somebody else had locked at the last try."""
        self._told: set[Delivery] = set()
        """Those of them that the log has named."""
        self._closing = Event()
        self._connected = Event()
        self._asked_at: float | None = None
        """When the statements began that have not been answered."""
        self._thread = Thread(target=self._run, name="marker", daemon=True)
        self._is_started = False

    def start(self) -> None:
        """Starts the thread, unless it was started before."""
        if not self._is_started:
            self._is_started = True
            self._thread.start()

    def put(self, outcome: Outcome) -> None:
        """Takes an outcome; it is written at once on a quiet system, and in batches on a busy one."""
        self._outcomes.put(outcome)

    def is_healthy(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds until outcomes can be written and leases renewed, and returns whether they can.

        As far as is known: a Postgres that has not answered for a third of a lease may let the leases run out.
        """
        deadline = time.monotonic() + timeout
        while not (self._connected.wait(max(0.0, deadline - time.monotonic())) and self._is_answered()):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True

    def _is_answered(self) -> bool:
        asked_at = self._asked_at
        return asked_at is None or time.monotonic() - asked_at < self.leases.seconds / 3

    def close(self, timeout: float) -> list[Delivery]:
        """Writes what is there and ends the thread, in `timeout` seconds; returns what could not be written by then."""
        self._closing.set()
        if self._is_started:
            self._thread.join(timeout)
        return self.leases.held() if self._thread.is_alive() else []

    def _run(self) -> None:
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
                    self._connected.set()
                    self._serve(connection)
                    return
            except postgres.AWAY as error:
                if self._failures == 0:
                    logs.get().warning("marks wait for Postgres", error=one_line(error), unwritten=self._kept())
            except psycopg.Error as error:  # this thread must not end: without it, no row of this worker would
                logs.get().error("marks cannot be written", error=one_line(error), unwritten=self._kept())
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
            if now >= renew_at:
                self._renew(connection)
                renew_at = now + self.leases.seconds / 3
            if now >= try_again_at:
                self._unwritten[:0], self._locked = self._locked, []
                with self._asking():
                    self.leases.renew_missed(connection)
                try_again_at = now + _LOOK
            if not self._unwritten:
                self._unwritten += self._collect(min(max(renew_at - time.monotonic(), 0.001), _LOOK))
            if self._unwritten:
                is_alone = len(self._unwritten) == 1
                self._write(connection)
                if not is_alone and not self._closing.is_set():
                    time.sleep(_GATHERING)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        self._asked_at = time.monotonic()
        try:
            yield
        finally:
            self._asked_at = None

    def _collect(self, timeout: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        try:
            outcomes.append(self._outcomes.get(timeout=timeout))
            while len(outcomes) < _BATCH:
                outcomes.append(self._outcomes.get_nowait())
        except Empty:
            return outcomes
        return outcomes

    def _renew(self, connection: Connection) -> None:
        with self._asking():
            has_asked = self.leases.renew(connection)
        if has_asked and not self._unwritten:
            self._failures = 0

    def _write(self, connection: Connection) -> None:
        # The latest of each: a handler may have ended after all when its row was already given back.
        outcomes = {outcome.delivery: outcome for outcome in self._unwritten}
        cursor = connection.cursor(row_factory=tuple_row)
        with self._asking():
            cursor.execute(
                query("mark"),
                {
                    **columns(outcomes.keys()),
                    "statuses": [outcome.status for outcome in outcomes.values()],
                    "delays": [float(outcome.delay) for outcome in outcomes.values()],
                    "attempts": [outcome.attempts for outcome in outcomes.values()],
                    "errors": [outcome.error for outcome in outcomes.values()],
                },
            )
            written = {Delivery(*row) for row in cursor}
            self._failures = 0
            self.leases.let_go(written)
            self._told -= written
            self._unwritten = [outcome for outcome in outcomes.values() if outcome.delivery not in written]
            if self._unwritten:
                self._sort_out(cursor)

    def _sort_out(self, cursor: Cursor[tuple[int, int]]) -> None:
        """Puts off what could not be written because somebody has the row locked, and drops what is no longer ours."""
        deliveries = [outcome.delivery for outcome in self._unwritten]
        running = set(cursor.execute(query("still_running"), columns(deliveries)))
        self._put_off([outcome for outcome in self._unwritten if outcome.delivery in running])
        for outcome in self._unwritten:
            if outcome.delivery not in running:
                self.leases.let_go([outcome.delivery])
                self._told.discard(outcome.delivery)
                logs.get().warning(
                    "dropped outcome",
                    row=outcome.delivery.row,
                    delivery=outcome.delivery.number,
                    status=outcome.status,
                    why="the row was taken from this worker meanwhile",
                )
        self._unwritten = []

    def _put_off(self, outcomes: list[Outcome]) -> None:
        self._locked += outcomes
        if untold := {outcome.delivery for outcome in outcomes} - self._told:
            logs.get().warning("marks wait for a lock", rows=sorted(delivery.row for delivery in untold))
            self._told |= untold
