"""Holds the state that all actors of one schedule share."""

import time
from dataclasses import dataclass, field
from queue import SimpleQueue
from random import Random
from typing import TYPE_CHECKING

from outbox.runtime.settings import RelaySettings
from tests.schedules.actor import Actor
from tests.schedules.database import Database
from tests.schedules.records import Records
from tests.schedules.redis_model import QUEUES, RedisModel

if TYPE_CHECKING:
    from tests.schedules.workers import Worker


MAX_ROWS = 14
"""Approximate highest id of added rows."""


@dataclass
class Clock:
    """Replaces the module `time` where the product waits for time to pass."""

    now: float = 1000.0

    def monotonic(self) -> float:
        """Returns the time of the schedule in seconds."""
        return self.now


@dataclass
class SharedState:
    """The state of one schedule. One actor runs at a time, except those that a released lock lets continue together."""

    database: Database
    seed: str
    relay_settings: RelaySettings
    clock: Clock = field(default_factory=Clock)
    records: Records = field(default_factory=Records)
    arrived: "SimpleQueue[Actor]" = field(default_factory=SimpleQueue)
    workers: "list[Worker]" = field(default_factory=list)
    """Workers that are alive."""
    rescues: list[Actor] = field(default_factory=list)
    is_fair: bool = False
    """Whether faults are over, and all rows must end."""
    trace: list[tuple[float, str, str]] = field(default_factory=list)
    """Time, actor and text of each line."""

    def __post_init__(self) -> None:
        self.draw = Random(self.seed)
        self.redis = RedisModel(self.draw.choice([0.0, 0.5]))
        self.queues = self.draw.choice([("default",), ("default",), QUEUES])
        self.row_limit = self.draw.choice([1, 2, 3, 5, MAX_ROWS])
        """Number of rows to add; a restore may remove some."""

    def note(self, actor: str, text: str) -> None:
        """Adds a line to the trace."""
        self.trace.append((time.time(), actor, text))

    def leaving_rows(self) -> set[int]:
        """Returns the rows that stopping workers gave back while handlers run: not due until these workers exit."""
        return {row for worker in self.workers if worker.is_leaving for row in worker.running_rows()}
