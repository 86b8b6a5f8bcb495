"""Marking what became of attempts, and renewing leases: all that a worker writes besides its claims."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread

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
from worker.claim import Claim

_BATCH = 1000
_GATHERING = 0.005
"""Seconds between two writes on a busy system: each costs Postgres a commit, and the handlers the interpreter."""
_LOOK = 0.2
"""Seconds between two tries at a row that somebody else has locked, and between two looks whether to end."""

OVERTIME = 5.0
"""Seconds past its time limit after which an attempt is no longer believed to end, and its lease is let go."""

SHORTEST_ANSWER_LIMIT = 5.0
"""Seconds that a statement may take, however short the lease: a busy Postgres is not away."""


class Marker:
    """A thread with a connection of its own that writes outcomes in batches and keeps the leases of what runs.

    While Postgres is away it keeps the outcomes and writes them when it is back; if a row was handed over again
    meanwhile, the fence decides, and the late outcome is dropped.
    """

    def __init__(self, database_url: str, lease: float, *, pooled: bool = False, overtime: float = OVERTIME) -> None:
        """Makes the thread.

        Args:
            database_url: where to.
            lease: seconds that a renewal is good for.
            pooled: whether that leads through a pooler in transaction mode.
            overtime: seconds past its time limit for which an attempt's lease is kept.
        """
        self._database_url = database_url
        self._pooled = pooled
        self._lease = lease
        self._overtime = overtime
        self._failures = 0
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._unwritten: list[Outcome] = []
        self._locked: list[Outcome] = []
        """Outcomes whose rows somebody else had locked at the last try."""
        self._try_locked_at = 0.0
        self._held: dict[Delivery, float] = {}
        self._lock = Lock()
        self._closing = Event()
        self._connected = Event()
        self._asked_at: float | None = None
        """When the statement began that has not been answered."""
        self._thread = Thread(target=self._run, name="marker", daemon=True)
        self._is_started = False

    def start(self) -> None:
        """Starts the thread, unless it was started before."""
        if not self._is_started:
            self._is_started = True
            self._thread.start()

    def hold(self, claims: list[Claim]) -> None:
        """Begins to renew the leases of these rows, until their outcome is written or they overrun their time."""
        now = time.monotonic()
        with self._lock:
            self._held.update({claimed.delivery: now + claimed.timeout + self._overtime for claimed in claims})

    def held(self) -> list[Delivery]:
        """Returns the deliveries whose outcome is not written yet."""
        with self._lock:
            return list(self._held)

    def overrun(self) -> int:
        """Returns how many attempts have overrun their time so far that their leases were let go."""
        now = time.monotonic()
        with self._lock:
            return sum(overtime <= now for overtime in self._held.values())

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
        return asked_at is None or time.monotonic() - asked_at < self._lease / 3

    def close(self, timeout: float) -> list[Delivery]:
        """Writes what is there and ends the thread, in `timeout` seconds; returns what could not be written by then."""
        self._closing.set()
        if self._is_started:
            self._thread.join(timeout)
        return self.held() if self._thread.is_alive() else []

    def _run(self) -> None:
        while not self._is_over():
            try:
                with postgres.connect(
                    self._database_url,
                    "outbox worker marks",
                    pooled=self._pooled,
                    answer_limit=min(postgres.ANSWER_LIMIT, max(SHORTEST_ANSWER_LIMIT, self._lease / 3)),
                ) as connection:
                    self._connected.set()
                    self._serve(connection)
                    return
            except postgres.AWAY as error:
                if self._failures == 0:
                    unwritten = len(self._unwritten) + len(self._locked)
                    logs.get().warning("marks wait for Postgres", error=one_line(error), unwritten=unwritten)
            except psycopg.Error as error:  # this thread must not end: without it, no row of this worker would
                logs.get().error("marks cannot be written", error=one_line(error), unwritten=len(self._unwritten))
            self._connected.clear()
            self._failures += 1
            time.sleep(reconnect_delay(self._failures))

    def _is_over(self) -> bool:
        return self._closing.is_set() and not self._unwritten and not self._locked and self._outcomes.empty()

    def _serve(self, connection: Connection) -> None:
        renew_at = 0.0
        while not self._is_over():
            if time.monotonic() >= renew_at:
                with self._asking():
                    self._renew(connection)
                renew_at = time.monotonic() + self._lease / 3
            if self._locked and time.monotonic() >= self._try_locked_at:
                self._unwritten[:0], self._locked = self._locked, []
            if not self._unwritten:
                self._unwritten += self._collect(min(max(renew_at - time.monotonic(), 0.001), _LOOK))
            if self._unwritten:
                is_alone = len(self._unwritten) == 1
                with self._asking():
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
        self._failures = 0

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
        now = time.monotonic()
        with self._lock:
            held = [delivery for delivery, overtime in self._held.items() if overtime > now]
        if held:
            connection.execute(query("renew_leases"), {**_columns(held), "lease": self._lease})

    def _write(self, connection: Connection) -> None:
        # The latest of each: a handler may have ended after all when its row was already given back.
        outcomes = {outcome.delivery: outcome for outcome in self._unwritten}
        cursor = connection.cursor(row_factory=tuple_row)
        cursor.execute(
            query("mark"),
            {
                **_columns(list(outcomes)),
                "statuses": [outcome.status for outcome in outcomes.values()],
                "delays": [float(outcome.delay) for outcome in outcomes.values()],
                "attempts": [outcome.attempts for outcome in outcomes.values()],
                "errors": [outcome.error for outcome in outcomes.values()],
            },
        )
        written = set(cursor.fetchall())
        passed_over = [outcome for outcome in outcomes.values() if outcome.delivery not in written]
        running = _still_running(cursor, passed_over) if passed_over else set()
        self._put_off([outcome for outcome in passed_over if outcome.delivery in running])
        with self._lock:
            for delivery in outcomes.keys() - running:
                self._held.pop(delivery, None)
        self._unwritten.clear()
        for outcome in passed_over:
            if outcome.delivery not in running:
                logs.get().warning(
                    "dropped outcome",
                    row=outcome.delivery.row,
                    delivery=outcome.delivery.number,
                    status=outcome.status,
                    why="the row was taken from this worker meanwhile",
                )

    def _put_off(self, outcomes: list[Outcome]) -> None:
        """Keeps outcomes whose rows somebody else has locked for later."""
        if outcomes and self._try_locked_at == 0.0:
            logs.get().warning("marks wait for a lock", rows=sorted(outcome.delivery.row for outcome in outcomes))
        self._locked += outcomes
        self._try_locked_at = time.monotonic() + _LOOK if self._locked else 0.0


def _still_running(cursor: Cursor[tuple[int, int]], outcomes: list[Outcome]) -> set[tuple[int, int]]:
    return set(cursor.execute(query("still_running"), _columns([outcome.delivery for outcome in outcomes])))


def _columns(deliveries: list[Delivery]) -> Mapping[str, list[int]]:
    return {
        "ids": [delivery.row for delivery in deliveries],
        "deliveries": [delivery.number for delivery in deliveries],
    }
