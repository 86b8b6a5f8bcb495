"""Defines a committed transition of a row, as recorded by the trigger in transitions.sql."""

from dataclasses import dataclass
from typing import Any

from outbox.rq_jobs import Delivery

Row = dict[str, Any]


@dataclass(frozen=True)
class Transition:
    """A committed change of one row, with facts about the row before it."""

    xid: Any
    actor: str
    at: float
    """Seconds since the epoch."""
    old: Row | None
    new: Row | None
    run_at: float | None
    """`run_at` after the transition; seconds since the epoch."""
    was_due: bool | None
    """Whether `run_at` had passed."""
    lease_passed: bool | None
    """Whether `lease_until` had passed, or was further ahead than any lease."""
    was_kept: bool | None
    """Whether the row's retention time was not over."""

    @property
    def role(self) -> str:
        """The actor's role, such as `relay`; for a worker, `claims` or `completes`."""
        return self.actor.partition(".")[2] or self.actor.partition("-")[0]

    @property
    def worker(self) -> str:
        """The name of the worker that made the transition."""
        return self.actor.partition(".")[0]

    @property
    def states(self) -> tuple[str | None, str | None]:
        """Status before and after; None if there is no row."""
        return self.old["status"] if self.old else None, self.new["status"] if self.new else None

    @property
    def changed(self) -> set[str]:
        """The changed columns of an update; empty for an insert or a delete."""
        old, new = self.old or {}, self.new or {}
        return {name for name in new if name in old and old[name] != new[name]}

    @property
    def delivery(self) -> Delivery:
        """The row's delivery before the transition; after it for a new row."""
        row = self.old or self.new
        assert row is not None
        return Delivery(row["id"], row["delivery"])

    @property
    def next_delivery(self) -> Delivery:
        """The row's delivery after the transition; before it for a deleted row."""
        row = self.new or self.old
        assert row is not None
        return Delivery(row["id"], row["delivery"])

    def __str__(self) -> str:
        before, after = self.states
        changes = {name: (self.new or {})[name] for name in sorted(self.changed - {"status"})}
        return f"row {self.delivery.job_id}: {before} -> {after} {changes or ''}".rstrip()
