"""Actors that stop before each of their steps, and connections whose statements are such steps."""

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from queue import SimpleQueue
from threading import Thread
from typing import Any, Self, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

from outbox import queries
from outbox.runtime.postgres import LimitedConnection

T = TypeVar("T")

TURN = "turn"
"""The gate between two tasks of an actor, where it holds no lock."""

END_OF_TRANSACTION = "end of transaction"
"""The gate before a commit or a rollback."""


class Order(Enum):
    """How an actor is to go on."""

    GO = "go"
    CUT = "cut"
    """The server is gone before the request gets there."""
    LOSE_ANSWER = "lose answer"
    """The server does what was asked, and is gone before the answer."""
    CRASH = "crash"
    """The process is killed."""
    END = "end"
    """The schedule is over."""


class Crash(BaseException):
    """The process was killed."""


class Ended(BaseException):
    """The schedule is over."""


class Actor(ABC, Thread):
    """A process, or a thread of one, that does one step at a time, each when it is ordered to."""

    passes: frozenset[str] = frozenset({"limit_transaction_lock_wait", "notify_relays"})
    """Before what it does not stop: what touches no row is part of the step that comes next."""
    begins_at_once = True
    """Whether a turn's first statement is part of the step that begins the turn."""

    def __init__(self, name: str, arrived: "SimpleQueue[Actor]", note: Callable[[str, str], None]) -> None:
        """Makes the thread.

        Args:
            name: shown in traces, and to the judge: `relay-1`.
            arrived: where the actor announces that it has stopped again.
            note: takes the actor's name and a line for the trace.
        """
        super().__init__(name=name, daemon=True)
        self._arrived = arrived
        self.note = note
        self._orders: SimpleQueue[Order] = SimpleQueue()
        self.stops = True
        """Whether it stops within its turns, too."""
        self._carried: Order | None = None
        """What a turn was begun with, until its first statement."""
        self.gate = ""
        """Before which step it stands."""
        self.connection: SteppedConnection | None = None
        self.pid = 0
        """Its session's process in Postgres."""
        self.is_over = False
        self.is_doomed = False
        """Whether its process was killed while it waited for an answer."""
        self.deadlock: set[int] = set()
        """Sessions of the deadlock that it has just run into."""
        self.failure: BaseException | None = None

    @abstractmethod
    def work(self) -> None:
        """Works until the schedule is over; called anew after a crash."""

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing for it to do now."""
        return False

    def run(self) -> None:
        """Works until it is ordered to end."""
        try:
            while not self.is_doomed:
                self._carried = None
                try:
                    self.work()
                except Crash:
                    continue
                break
        except Ended:
            pass
        except BaseException as error:  # noqa: BLE001 - it is the schedule's failure
            self.failure = error
        self.is_over = True
        self.gate = "over"
        self._arrived.put(self)

    def stop_before(self, step: str) -> Order:
        """Waits until it is ordered to go on.

        Raises:
            Crash, Ended: instead of the step.
        """
        if step in self.passes or (step != TURN and not self.stops):
            return Order.GO
        if self._carried is not None:
            order, self._carried = self._carried, None
            return order
        self.gate = step
        self._arrived.put(self)
        order = self._orders.get()
        self.gate = ""
        if order in {Order.CRASH, Order.END}:
            if self.connection:
                self.connection.abandon()
            raise Crash if order is Order.CRASH else Ended
        if step == TURN and self.begins_at_once:
            self._carried = order
        return order

    def go_on(self, order: Order) -> None:
        """Lets the actor do its next step; for the scheduler."""
        self._orders.put(order)


class SteppedConnection(LimitedConnection):
    """A connection that asks its actor before each round trip."""

    actor: Actor | None = None
    statement = ""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Waits for the actor's turn, and then for the answer."""
        actor = self.actor
        if actor is None or threading.current_thread() is not actor or not (step := self._step(gen)):
            return super().wait(gen, interval, timeout)
        order = actor.stop_before(step)
        if order is Order.CUT:
            self.break_off()
            raise psycopg.OperationalError("cut by the tester")
        try:
            answer = super().wait(gen, interval, timeout)
        except psycopg.errors.DeadlockDetected as error:
            actor.note(actor.name, f"  deadlock: {error.diag.message_detail}")
            actor.deadlock = {int(pid) for pid in re.findall(r"Process (\d+) waits", error.diag.message_detail or "")}
            self._doom(actor)
            raise
        except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable) as error:  # by its own limit, too
            self._doom(actor)
            raise psycopg.errors.LockNotAvailable("timed out by the tester") from error
        self._doom(actor)
        if order is Order.LOSE_ANSWER:
            self.break_off()
            raise psycopg.OperationalError("answer lost by the tester")
        return answer

    def _doom(self, actor: Actor) -> None:
        if actor.is_doomed:
            self.break_off()
            raise Crash

    def _step(self, gen: PQGen[Any]) -> str:
        match gen.__name__:  # type: ignore[attr-defined]  # generators have one
            case "_execute_gen":
                return self.statement
            case "_exit_gen" if self._num_transactions == 1:
                return END_OF_TRANSACTION
        return ""

    def break_off(self) -> None:
        """Ends the session, as a client that vanishes does; its transaction is over when this returns."""
        if not self.closed:
            if self.pgconn.transaction_status in {TransactionStatus.INTRANS, TransactionStatus.INERROR}:
                self.pgconn.exec_(b"ROLLBACK")
            self.pgconn.finish()

    def abandon(self) -> None:
        """Does that unless the session is idle: then another process may as well go on with it."""
        if not self.closed and self.pgconn.transaction_status != TransactionStatus.IDLE:
            self.break_off()


class SteppedCursor(psycopg.Cursor[Any]):
    """A cursor that tells its connection which statement is next."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        """Executes a statement and notes how many rows it returned or wrote."""
        connection = self.connection
        assert isinstance(connection, SteppedConnection)
        connection.statement = name_of(query)
        super().execute(query, params, **options)
        if connection.actor:
            connection.actor.note(
                connection.actor.name, f"  {connection.statement}{_shown(params)}: {self.rowcount} rows"
            )
        return self


def name_of(text: str) -> str:
    """Returns the name of one of the project's statements, or the beginning of any other."""
    for name, statement in queries._statements().items():
        if statement is text:
            return name
    return " ".join(str(text).split()[:4])


def _shown(params: Any) -> str:
    if not isinstance(params, dict) or "ids" not in params:
        return ""
    numbers = params.get("deliveries") or [None] * len(params["ids"])
    shown = [
        str(row) if number is None else f"{row}-{number}" for row, number in zip(params["ids"], numbers, strict=True)
    ]
    return f" {shown}{params.get('statuses') or ''}"
