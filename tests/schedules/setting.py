"""What all actors of one schedule share."""

import time
from dataclasses import dataclass, field
from queue import SimpleQueue
from random import Random
from typing import TYPE_CHECKING

from outbox.runtime.settings import RelaySettings
from tests.schedules.bag import QUEUES, Bag
from tests.schedules.books import Books
from tests.schedules.stage import Stage
from tests.schedules.stepping import Actor

if TYPE_CHECKING:
    from tests.schedules.workers import Worker


MOST_ROWS = 14
"""Ids up to which rows are added, about."""


@dataclass
class Clock:
    """Stands in for the module `time` where the product waits for time to pass."""

    now: float = 1000.0

    def monotonic(self) -> float:
        """Returns the schedule's own time, in seconds."""
        return self.now


@dataclass
class Setting:
    """One schedule's state. One actor runs at a time, but for those that go on together when a lock is released."""

    stage: Stage
    seed: str
    relay_settings: RelaySettings
    clock: Clock = field(default_factory=Clock)
    books: Books = field(default_factory=Books)
    arrived: "SimpleQueue[Actor]" = field(default_factory=SimpleQueue)
    workers: "list[Worker]" = field(default_factory=list)
    """Those that live."""
    rescues: list[Actor] = field(default_factory=list)
    is_fair: bool = False
    """Whether faults are over, and everything that is left is to be finished."""
    trace: list[tuple[float, str, str]] = field(default_factory=list)
    """When, who, and what."""

    def __post_init__(self) -> None:
        self.draw = Random(self.seed)
        self.bag = Bag(self.draw.choice([0.0, 0.5]))
        self.queues = self.draw.choice([("default",), ("default",), QUEUES])
        self.most_rows = self.draw.choice([1, 2, 3, 5, MOST_ROWS])
        """How many are added, unless a restore forgets some."""

    def note(self, who: str, what: str) -> None:
        """Adds a line to the trace."""
        self.trace.append((time.time(), who, what))

    def leaving_rows(self) -> set[int]:
        """Returns rows that stopping workers gave back while handlers run: not due before these workers have exited."""
        return {row for worker in self.workers if worker.is_leaving for row in worker.running_rows()}
