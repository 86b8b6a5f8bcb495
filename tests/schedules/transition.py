"""One committed transition of a row, as the trigger in transitions.sql has recorded it."""

from dataclasses import dataclass
from typing import Any

from outbox.rq_jobs import Delivery

Row = dict[str, Any]


@dataclass(frozen=True)
class Transition:
    """A committed change of one row, with what was true of the row before it."""

    xid: Any
    actor: str
    at: float
    """Seconds since the epoch."""
    old: Row | None
    new: Row | None
    run_at: float | None
    """Of the row after it; seconds since the epoch."""
    was_due: bool | None
    """Whether `run_at` had passed."""
    lease_passed: bool | None
    """Whether it had, or lay further ahead than any lease."""
    was_kept: bool | None
    """Whether the row's retention time was not over."""

    @property
    def role(self) -> str:
        """What the actor is: `relay`, or for a worker `claims` or `completes`."""
        return self.actor.partition(".")[2] or self.actor.partition("-")[0]

    @property
    def worker(self) -> str:
        """The worker whose claims or completions these are."""
        return self.actor.partition(".")[0]

    @property
    def states(self) -> tuple[str | None, str | None]:
        """Status before and after; None where there is no row."""
        return self.old["status"] if self.old else None, self.new["status"] if self.new else None

    @property
    def changed(self) -> set[str]:
        """The columns that differ, where there was a row and is one."""
        old, new = self.old or {}, self.new or {}
        return {name for name in new if name in old and old[name] != new[name]}

    @property
    def delivery(self) -> Delivery:
        """Which delivery the row was before; of a new row, which it is."""
        row = self.old or self.new
        assert row is not None
        return Delivery(row["id"], row["delivery"])

    @property
    def next_delivery(self) -> Delivery:
        """Which delivery the row is now; of a deleted row, which it was."""
        row = self.new or self.old
        assert row is not None
        return Delivery(row["id"], row["delivery"])

    def __str__(self) -> str:
        before, after = self.states
        changes = {name: (self.new or {})[name] for name in sorted(self.changed - {"status"})}
        return f"row {self.delivery.job_id}: {before} -> {after} {changes or ''}".rstrip()
