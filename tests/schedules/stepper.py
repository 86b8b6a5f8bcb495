"""Lets actors take their steps one by one, and sees who waits for whose lock."""

import time
from queue import Empty, SimpleQueue

from tests.schedules.stage import Stage
from tests.schedules.stepping import Actor, Order

_PATIENCE = 0.005
"""Seconds after which a statement without an answer is looked for among those that wait for a lock."""

_LIMIT = 30.0
"""Seconds after which a statement that neither answers nor waits for a lock fails the run."""


class StuckError(Exception):
    """A statement neither answers nor waits for a lock."""


class Stepper:
    """All actors of a schedule. Between two steps each stands before its next one, or waits for a lock in Postgres.

    Postgres' own table of locks says who waits, not a clock: so the same seed makes the same schedule.
    """

    def __init__(self, stage: Stage, arrived: "SimpleQueue[Actor]") -> None:
        self._stage = stage
        self._arrived = arrived
        self.actors: list[Actor] = []
        """Those that are not over."""
        self.deadlocks: list[list[str]] = []
        """The names of those who waited for one another."""
        self.failures: list[str] = []
        """What actors have raised that their processes would not survive."""
        self.blocked: set[Actor] = set()
        """Those that wait for a lock."""
        self._moving: set[Actor] = set()

    def start(self, actor: Actor) -> None:
        """Starts an actor."""
        self.actors.append(actor)
        self._moving.add(actor)
        actor.start()
        self._settle()

    def step(self, actor: Actor, order: Order) -> None:
        """Lets an actor take a step, and others whom that lets go on."""
        self._moving.add(actor)
        actor.go_on(order)
        self._settle()

    def time_out(self, actor: Actor) -> None:
        """Ends an actor's wait for a lock, as `lock_timeout` would."""
        self.blocked.discard(actor)
        self._stage.cancel(actor)
        self._settle()

    def end(self) -> None:
        """Ends all actors."""
        while self.actors:
            for actor in [actor for actor in self.actors if actor not in self.blocked]:
                self.step(actor, Order.END)
            for actor in list(self.blocked):
                self.time_out(actor)

    def _settle(self) -> None:
        """Waits until every actor stands before a step, waits for a lock, or is over."""
        limit = time.monotonic() + _LIMIT
        while self._moving:
            try:
                if self._moving <= self.blocked:
                    self._arrive(self._arrived.get_nowait())
                else:
                    self._arrive(self._arrived.get(timeout=_PATIENCE))
            except Empty:
                if self._look():
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

    def _look(self) -> bool:
        """Returns whether all that move wait for locks, and not for one another."""
        found = self._stage.blocked(self._moving)
        self.blocked = {actor for actor in self._moving if actor.pid in found}
        if self.blocked != self._moving:
            return False
        if _is_deadlocked(found):
            time.sleep(_PATIENCE)  # until Postgres finds that as well
            return False
        return self._arrived.empty()


def _is_deadlocked(blockers: dict[int, list[int]]) -> bool:
    """Returns whether any of these sessions waits for itself, by way of others."""
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
