"""Defines actors: threads that stop before each of their steps until they are ordered to continue."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.schedules.stepped_connection import SteppedConnection

TURN = "turn"
"""The gate between two turns of an actor, where it holds no lock."""

END_OF_TRANSACTION = "end of transaction"
"""The gate before a commit or a rollback."""


class Order(Enum):
    """How an actor continues."""

    GO = "go"
    CUT = "cut"
    """The connection is lost before the request arrives."""
    LOSE_ANSWER = "lose answer"
    """The server executes the request, and the connection is lost before the answer."""
    CRASH = "crash"
    """The process is killed."""
    END = "end"
    """The schedule is over."""


class Crash(BaseException):
    """The process was killed."""


class Ended(BaseException):
    """The schedule is over."""


class Actor(ABC, Thread):
    """A process, or a thread of one, that takes one step per order."""

    ungated: frozenset[str] = frozenset({"limit_transaction_lock_wait", "notify_relays"})
    """Statements before which it does not stop: they touch no row, and belong to the next step."""
    begins_at_once = True
    """Whether a turn's first statement is part of the step that begins the turn."""

    def __init__(self, name: str, arrived: "SimpleQueue[Actor]", note: Callable[[str, str], None]) -> None:
        """Creates the thread, and does not start it.

        Args:
            name: its name in traces and for the judge, such as `relay-1`.
            arrived: gets the actor each time that it has stopped.
            note: takes the actor's name and a line for the trace.
        """
        super().__init__(name=name, daemon=True)
        self._arrived = arrived
        self.note = note
        self._orders: SimpleQueue[Order] = SimpleQueue()
        self.stops = True
        """Whether it also stops within its turns."""
        self._carried: Order | None = None
        """The order that began a turn, until the turn's first statement."""
        self.gate = ""
        """The step before which it has stopped."""
        self.connection: SteppedConnection | None = None
        self.pid = 0
        """The process id of its session in Postgres."""
        self.is_over = False
        self.is_doomed = False
        """Whether its process was killed while it waited for an answer."""
        self.deadlock: set[int] = set()
        """Process ids of the sessions in its last deadlock."""
        self.failure: BaseException | None = None

    @abstractmethod
    def work(self) -> None:
        """Works until the schedule is over; called again after a crash."""

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do now."""
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
        except BaseException as error:  # noqa: BLE001 - reported as a failure of the schedule
            self.failure = error
        self.is_over = True
        self.gate = "over"
        self._arrived.put(self)

    def stop_before(self, step: str) -> Order:
        """Waits for the order to continue.

        Raises:
            Crash, Ended: instead of the step.
        """
        if step in self.ungated or (step != TURN and not self.stops):
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
        """Orders the actor to take its next step; called by the scheduler."""
        self._orders.put(order)
