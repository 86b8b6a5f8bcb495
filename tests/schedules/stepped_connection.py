"""Defines connections that stop their actor before each statement."""

import re
import threading
from typing import Any, Self, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

from outbox import queries
from outbox.runtime.postgres import LimitedConnection
from tests.schedules.actor import END_OF_TRANSACTION, Actor, Crash, Order

T = TypeVar("T")


class SteppedConnection(LimitedConnection):
    """A connection that stops its actor before each statement and each end of a transaction."""

    actor: Actor | None = None
    statement = ""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Waits for the order to continue, and then for the answer."""
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
        except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable) as error:  # also by its own limit
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
        """Ends the session, as if the client had vanished; its transaction is over when this returns."""
        if not self.closed:
            if self.pgconn.transaction_status in {TransactionStatus.INTRANS, TransactionStatus.INERROR}:
                self.pgconn.exec_(b"ROLLBACK")
            self.pgconn.finish()

    def abandon(self) -> None:
        """Ends the session unless it is idle: then the next process can reuse it."""
        if not self.closed and self.pgconn.transaction_status != TransactionStatus.IDLE:
            self.break_off()


class SteppedCursor(psycopg.Cursor[Any]):
    """A cursor that sets the name of the next statement on its connection."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        """Executes a statement, and adds the number of its rows to the trace."""
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
    """Returns the name of one of the product's statements, or the first words of any other."""
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
