"""A duty of the relay: what it does again and again, how often, and what wakes it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from outbox.runtime.postgres import Connection
from outbox_relay.look import Work


@dataclass
class Duty:
    """One duty. It is due after its interval, or earlier if its last step asked for that.

    A duty with `has_work` sleeps after a step that left nothing to do, until a look finds work for it. Times are
    seconds of the monotonic clock.
    """

    name: str
    """Its name in the log."""
    step: Callable[[Connection], float | None]
    """Does one step; returns the seconds until the next one, or None if nothing is left to do."""
    interval: float
    """Seconds between two steps, or between two looks for its work."""
    needs_redis: bool = False
    has_work: Callable[[Work], bool] | None = None
    """Returns whether a look has found work for it."""
    wakes_on_hint: bool = False
    """Whether a hint that rows were committed makes it due."""
    wakes: "Duty | None" = None
    """A duty that is due after each step that had something to do."""
    due: float = 0.0
    """When its next step is due; infinite while it sleeps."""
    look_due: float = 0.0
    """When a look next asks whether there is work. A hint or a step does not postpone that."""
    refusals: int = 0
    """Consecutive steps that Postgres has refused."""
    log_due: float = 0.0
    """When the next refusal is logged."""

    def wake(self) -> None:
        """Makes it due now."""
        self.due = 0.0

    def end_step(self, again: float | None) -> None:
        """Sets when its next step is due.

        Args:
            again: what `step` has returned.
        """
        if again is None:
            again = math.inf if self.has_work else self.interval
        elif self.wakes:
            self.wakes.wake()
        self.due = time.monotonic() + again
