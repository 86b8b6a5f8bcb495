"""Marking what became of attempts, and renewing leases: all that a worker writes besides its claims."""

import time
from collections.abc import Mapping
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread

import psycopg
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

OVERTIME = 5.0
"""Seconds past its time limit after which an attempt is no longer believed to end, and its lease is let go."""


class Marker:
    """A thread with a connection of its own that writes outcomes in batches and keeps the leases of what runs.

    While Postgres is away it keeps the outcomes and writes them when it is back; if a row was handed over again
    meanwhile, the fence decides, and the late outcome is dropped.
    """

    def __init__(self, database_url: str, lease: float, *, pooled: bool = False) -> None:
        self._database_url = database_url
        self._pooled = pooled
        self._lease = lease
        self._failures = 0
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._held: dict[Delivery, float] = {}
        self._lock = Lock()
        self._closing = Event()
        self.healthy = Event()
        """Whether outcomes can be written and leases renewed, as far as is known."""
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
            self._held.update({claimed.delivery: now + claimed.timeout + OVERTIME for claimed in claims})

    def held(self) -> list[Delivery]:
        """Returns the deliveries whose outcome is not written yet."""
        with self._lock:
            return list(self._held)

    def put(self, outcome: Outcome) -> None:
        """Takes an outcome; it is written at once on a quiet system, and in batches on a busy one."""
        self._outcomes.put(outcome)

    def close(self, timeout: float) -> list[Delivery]:
        """Writes what is there and ends the thread, in `timeout` seconds; returns what could not be written by then."""
        self._closing.set()
        if self._is_started:
            self._thread.join(timeout)
        return self.held() if self._thread.is_alive() else []

    def _run(self) -> None:
        unwritten: list[Outcome] = []
        while True:
            try:
                with postgres.connect(self._database_url, "outbox worker marks", pooled=self._pooled) as connection:
                    self.healthy.set()
                    self._serve(connection, unwritten)
                    return
            except postgres.AWAY as error:
                if self._failures == 0:
                    logs.get().warning("marks wait for Postgres", error=one_line(error), unwritten=len(unwritten))
            except psycopg.Error as error:  # this thread must not end: without it, no row of this worker would
                logs.get().error("marks cannot be written", error=one_line(error), unwritten=len(unwritten))
            self.healthy.clear()
            self._failures += 1
            time.sleep(reconnect_delay(self._failures))

    def _serve(self, connection: Connection, unwritten: list[Outcome]) -> None:
        renew_every = self._lease / 3
        renew_at = 0.0
        while True:
            if time.monotonic() >= renew_at:
                self._renew(connection)
                renew_at = time.monotonic() + renew_every
            if not unwritten:
                unwritten += self._collect(min(max(renew_at - time.monotonic(), 0.001), 0.2))
            if unwritten:
                self._write(connection, unwritten)
                if len(unwritten) > 1 and not self._closing.is_set():
                    time.sleep(_GATHERING)
                unwritten.clear()
                self._failures = 0
            elif self._closing.is_set() and self._outcomes.empty():
                return

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

    def _write(self, connection: Connection, unwritten: list[Outcome]) -> None:
        # The latest of each: a handler may have ended after all when its row was already given back.
        outcomes = list({outcome.delivery: outcome for outcome in unwritten}.values())
        deliveries = [outcome.delivery for outcome in outcomes]
        cursor = connection.cursor(row_factory=tuple_row)
        cursor.execute(
            query("mark"),
            {
                **_columns(deliveries),
                "statuses": [outcome.status for outcome in outcomes],
                "delays": [float(outcome.delay) for outcome in outcomes],
                "attempts": [outcome.attempts for outcome in outcomes],
                "errors": [outcome.error for outcome in outcomes],
            },
        )
        written = set(cursor.fetchall())
        with self._lock:
            for delivery in deliveries:
                self._held.pop(delivery, None)
        for outcome in outcomes:
            if outcome.delivery not in written:
                logs.get().warning(
                    "dropped outcome",
                    row=outcome.delivery.row,
                    delivery=outcome.delivery.number,
                    status=outcome.status,
                    why="the row was taken from this worker meanwhile",
                )


def _columns(deliveries: list[Delivery]) -> Mapping[str, list[int]]:
    return {
        "ids": [delivery.row for delivery in deliveries],
        "deliveries": [delivery.number for delivery in deliveries],
    }
