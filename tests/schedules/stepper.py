"""Makes actors take their steps one by one, and detects which of them wait for locks."""

import time
from queue import Empty, SimpleQueue

from tests.schedules.actor import Actor, Order
from tests.schedules.database import Database

_POLL = 0.005
"""Seconds after which an unanswered statement is checked for a wait for a lock."""

_LIMIT = 30.0
"""Seconds after which a statement that neither answers nor waits for a lock fails the run."""


class StuckError(Exception):
    """A statement neither answers nor waits for a lock."""


class Stepper:
    """Steps all actors of a schedule. Between two steps, each is at its next gate or waits for a lock in Postgres.

    Postgres' table of locks decides which actors wait, not a clock: so the same seed gives the same schedule.
    """

    def __init__(self, database: Database, arrived: "SimpleQueue[Actor]") -> None:
        self._database = database
        self._arrived = arrived
        self.actors: list[Actor] = []
        """Actors that are not over."""
        self.deadlocks: list[list[str]] = []
        """The names of the actors in each deadlock."""
        self.failures: list[str] = []
        """Exceptions of actors that would have ended their processes."""
        self.blocked: set[Actor] = set()
        """Actors that wait for a lock."""
        self._moving: set[Actor] = set()

    def start(self, actor: Actor) -> None:
        """Starts an actor."""
        self.actors.append(actor)
        self._moving.add(actor)
        actor.start()
        self._settle()

    def step(self, actor: Actor, order: Order) -> None:
        """Makes an actor take a step, and waits also for actors that the step unblocks."""
        self._moving.add(actor)
        actor.go_on(order)
        self._settle()

    def time_out(self, actor: Actor) -> None:
        """Ends an actor's wait for a lock, as `lock_timeout` would."""
        self.blocked.discard(actor)
        self._database.cancel(actor)
        self._settle()

    def end(self) -> None:
        """Ends all actors."""
        while self.actors:
            for actor in [actor for actor in self.actors if actor not in self.blocked]:
                self.step(actor, Order.END)
            for actor in list(self.blocked):
                self.time_out(actor)

    def _settle(self) -> None:
        """Waits until every actor is at a gate, waits for a lock, or is over."""
        limit = time.monotonic() + _LIMIT
        while self._moving:
            try:
                if self._moving <= self.blocked:
                    self._arrive(self._arrived.get_nowait())
                else:
                    self._arrive(self._arrived.get(timeout=_POLL))
            except Empty:
                if self._all_wait():
                    return
                if time.monotonic() > limit:
                    raise StuckError(f"no answer: {sorted(actor.name for actor in self._moving)}") from None

    def _arrive(self, actor: Actor) -> None:
        self._moving.discard(actor)
        self.blocked.discard(actor)
        if actor.deadlock:
            self.deadlocks.append(sorted(other.name for other in self.actors if other.pid in actor.deadlock))
            actor.deadlock = set()
        if actor.is_over:
            self.actors.remove(actor)
            actor.join()
            if actor.failure:
                self.failures.append(f"{actor.name} ends with {type(actor.failure).__name__}: {actor.failure}")

    def _all_wait(self) -> bool:
        """Updates the blocked actors; returns whether all moving actors wait for locks without a deadlock."""
        blockers = self._database.blocked(self._moving)
        self.blocked = {actor for actor in self._moving if actor.pid in blockers}
        if self.blocked != self._moving:
            return False
        if _is_deadlocked(blockers):
            time.sleep(_POLL)  # until Postgres detects it too
            return False
        return self._arrived.empty()


def _is_deadlocked(blockers: dict[int, list[int]]) -> bool:
    """Whether any of these sessions waits for itself, directly or through others."""
    for start, directly in blockers.items():
        reached, left = set[int](), list(directly)
        while left:
            session = left.pop()
            if session == start:
                return True
            if session not in reached:
                reached.add(session)
                left += blockers.get(session, [])
    return False
