"""Judges the transitions of rows: which the design allows, who may make them, and what must hold then."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from outbox.rq_jobs import Delivery
from tests.schedules.records import Records
from tests.schedules.transition import Row, Transition

Check = Callable[[Transition, Row, Row], bool]

_TIMES = {"run_at", "enqueued_at", "lease_until", "done_at"}
_OUTCOME = {"status", "lease_until", "attempts", "last_error"}

_BY_THE_HOLDER: dict[str, Check] = {
    "the row is the worker's": lambda transition, old, _: old["worker"] == transition.worker
}
_PASSED: dict[str, Check] = {"the lease had passed": lambda transition, _, __: bool(transition.lease_passed)}

_ALLOWED: dict[tuple[str, str | None, str | None], tuple[set[str], dict[str, Check]]] = {
    ("adder", None, "pending"): (
        set(),
        {"a new row was never handed over": lambda _, __, new: new["delivery"] == new["attempts"] == 0},
    ),
    ("relay", "pending", "enqueued"): (
        {"status", "delivery", "enqueued_at"},
        {"delivery grows by one": lambda _, old, new: new["delivery"] == old["delivery"] + 1},
    ),
    ("sweep", "enqueued", "pending"): ({"status"}, {}),
    ("claims", "enqueued", "running"): (
        {"status", "attempts", "worker", "started_at", "lease_until"},
        {
            "attempts grow by one": lambda _, old, new: new["attempts"] == old["attempts"] + 1,
            "attempts stay within max_retries + 1": lambda _, __, new: new["attempts"] <= new["max_retries"] + 1,
            "the claim is in the worker's name": lambda transition, _, new: new["worker"] == transition.worker,
            "the row was due": lambda transition, _, __: bool(transition.was_due),
        },
    ),
    ("claims", "running", "running"): ({"started_at", "lease_until"}, _BY_THE_HOLDER),
    ("completes", "running", "running"): ({"lease_until"}, _BY_THE_HOLDER),
    ("completes", "running", "done"): ({*_OUTCOME, "done_at"}, _BY_THE_HOLDER),
    ("completes", "running", "pending"): ({*_OUTCOME, "run_at"}, _BY_THE_HOLDER),
    ("completes", "running", "dead"): ({*_OUTCOME, "run_at"}, _BY_THE_HOLDER),
    ("rescue", "running", "running"): (set(), _PASSED),
    ("rescue", "running", "pending"): (
        {"status", "lease_until", "run_at", "last_error"},
        {**_PASSED, "attempts are left": lambda _, old, __: old["attempts"] <= old["max_retries"]},
    ),
    ("rescue", "running", "dead"): (
        {"status", "lease_until", "last_error"},
        {**_PASSED, "no attempts are left": lambda _, old, __: old["attempts"] > old["max_retries"]},
    ),
    ("operator", "dead", "pending"): (
        {"status", "attempts", "run_at", "worker"},
        {"attempts restart at 0": lambda _, __, new: new["attempts"] == 0 and new["worker"] is None},
    ),
    ("operator", "dead", None): (set(), {}),
    ("retention", "done", None): (
        set(),
        {"the retention time was over": lambda transition, _, __: not transition.was_kept},
    ),
    ("time", "pending", "pending"): (_TIMES, {}),
    ("time", "enqueued", "enqueued"): (_TIMES, {}),
    ("time", "running", "running"): (_TIMES, {}),
    ("time", "done", "done"): (_TIMES, {}),
}


class Judge:
    """Judges the transitions of one schedule in order, and then the records."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._rows: dict[int, Row] = {}
        self._touched: dict[tuple[str, Delivery], Any] = {}
        """For each rescue and delivery, the transaction in which it first wrote the row unchanged."""
        self._enqueued: dict[Delivery, list[Transition]] = {}
        """The transitions of each delivery from its hand-over until it was no longer enqueued."""
        self._over: set[tuple[str, Delivery]] = set()
        """Worker and delivery of rows that were completed, or taken from the worker."""
        self.counts: Counter[str] = Counter()
        """The number of transitions of each kind."""
        self.trace: list[tuple[float, str, str]] = []
        self.violations: list[tuple[float, str]] = []

    def judge(self, transitions: list[Row]) -> list[tuple[float, str]]:
        """Returns all violations, each with its time."""
        for recorded in transitions:
            fields = {name: value for name, value in recorded.items() if name != "seq"}
            transition = Transition(**fields)
            if transition.role == "restore":
                self._rows = {int(row): content for row, content in (transition.new or {}).items()}
                continue
            for broken in self._broken(transition):
                self.violations.append((transition.at, f"{transition.actor} breaks “{broken}”: {transition}"))
            self._follow(transition)
        self._judge_outcomes()
        self._judge_dropped()
        return sorted(self.violations + self._records.violations)

    def _broken(self, transition: Transition) -> list[str]:
        before, after = transition.states
        allowed = _ALLOWED.get((transition.role, before, after))
        if allowed is None:
            return [f"no {transition.role} turns a row from {before} to {after or 'deleted'}"]
        columns, checks = allowed
        old, new = transition.old or {}, transition.new or {}
        broken = [text for text, check in checks.items() if not check(transition, old, new)]
        if others := transition.changed - columns:
            broken.append(f"columns {sorted(others)} do not change")
        if before is not None and self._rows.get(old["id"]) != old:
            broken.append("a row is as its last transition left it")
        if transition.role == "completes" and after != "running" and not self._is_outcome(transition, new):
            broken.append("a completion writes an outcome of this attempt")
        if transition.role == "rescue" and after != "running" and not self._was_touched(transition):
            broken.append("a rescue takes a row only after an earlier transaction that wrote it")
        missing = self._records.found_missing.get(transition.actor, ())
        if transition.role == "sweep" and transition.delivery not in missing:
            broken.append("a sweep takes back only what it found missing")
        return broken

    def _is_outcome(self, transition: Transition, new: Row) -> bool:
        return any(
            at <= transition.at and (outcome.status, outcome.attempts) == (new["status"], new["attempts"])
            for at, outcome in self._records.outcomes.get((transition.worker, transition.delivery), ())
        )

    def _was_touched(self, transition: Transition) -> bool:
        touched = self._touched.get((transition.actor, transition.delivery))
        return touched is not None and touched != transition.xid

    def _follow(self, transition: Transition) -> None:
        before, after = transition.states
        self.counts[f"{transition.role}: {before} -> {after}"] += 1
        self.trace.append((transition.at, transition.actor, f"    {transition}"))
        row = transition.next_delivery.row_id
        if transition.new is None:
            self._rows.pop(row, None)
        else:
            self._rows[row] = transition.new
        if "enqueued" in transition.states:
            self._enqueued.setdefault(transition.next_delivery, []).append(transition)
        if transition.role == "rescue" and after == "running":
            self._touched.setdefault((transition.actor, transition.delivery), transition.xid)
        elif before == "running" and after != "running":
            assert transition.old is not None
            self._over.add((transition.old["worker"], transition.delivery))

    def _judge_outcomes(self) -> None:
        """Checks that each outcome is written, unless its worker was killed or its row taken back."""
        excused = self._over | self._records.held_at_restore
        for (worker, delivery), outcomes in self._records.outcomes.items():
            if worker not in self._records.killed and (worker, delivery) not in excused:
                at, outcome = outcomes[-1]
                self.violations.append((at, f"lost outcome: {worker} put {outcome.status} for {delivery.job_id}"))

    def _judge_dropped(self) -> None:
        """Checks that no claim drops a job of a row that is enqueued with that delivery, and due.

        A hand-over counts from its statement, not from its commit, because the claim waits for the commit.
        """
        for dropped in () if self._records.was_restored else self._records.dropped:
            transitions = self._enqueued.get(dropped.delivery, ())
            before = [transition for transition in transitions if transition.at < dropped.answered_at]
            if not before or before[-1].states[1] != "enqueued":
                continue
            if (before[-1].run_at or 0.0) < dropped.asked_at:
                text = f"lost job: {dropped.worker} drops {dropped.delivery.job_id}, which is enqueued and due"
                self.violations.append((dropped.answered_at, text))
