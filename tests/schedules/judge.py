"""The judge: which transitions the design allows, who may make them, and what must hold then."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from outbox.rq_jobs import Delivery
from tests.schedules.books import Books
from tests.schedules.transition import Row, Transition

Check = Callable[[Transition, Row, Row], bool]

_TIMES = {"run_at", "enqueued_at", "lease_until", "done_at"}
_OUTCOME = {"status", "lease_until", "attempts", "last_error"}

_BY_THE_HOLDER: dict[str, Check] = {"the row is the worker's": lambda by, old, _: old["worker"] == by.worker}
_PASSED: dict[str, Check] = {"the lease had passed": lambda by, _, __: bool(by.lease_passed)}

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
            "the claim is in the worker's name": lambda by, _, new: new["worker"] == by.worker,
            "the row was due": lambda by, _, __: bool(by.was_due),
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
        {"attempts begin anew": lambda _, __, new: new["attempts"] == 0 and new["worker"] is None},
    ),
    ("operator", "dead", None): (set(), {}),
    ("retention", "done", None): (set(), {"the retention time was over": lambda by, _, __: not by.was_kept}),
    ("time", "pending", "pending"): (_TIMES, {}),
    ("time", "enqueued", "enqueued"): (_TIMES, {}),
    ("time", "running", "running"): (_TIMES, {}),
    ("time", "done", "done"): (_TIMES, {}),
}


class Judge:
    """Judges the transitions of one schedule in their order, and then the books by them."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._rows: dict[int, Row] = {}
        self._touched: dict[tuple[str, Delivery], Any] = {}
        """By rescue and delivery: the transaction in which it first wrote the row as it was."""
        self._enqueued: dict[Delivery, list[Transition]] = {}
        """What happened to each delivery from its hand-over until it ceased to be enqueued."""
        self._over: set[tuple[str, Delivery]] = set()
        """By worker and delivery: what was completed, or taken from the worker."""
        self.counts: Counter[str] = Counter()
        """How often each kind of transition was seen."""
        self.trace: list[tuple[float, str, str]] = []
        self.violations: list[tuple[float, str]] = []

    def judge(self, records: list[Row]) -> list[tuple[float, str]]:
        """Returns what must not have happened, each with its time."""
        for record in records:
            fields = {name: value for name, value in record.items() if name != "seq"}
            by = Transition(**fields)
            if by.role == "restore":
                self._rows = {int(row): content for row, content in (by.new or {}).items()}
                continue
            for broken in self._broken(by):
                self.violations.append((by.at, f"{by.actor} breaks “{broken}”: {by}"))
            self._follow(by)
        self._judge_outcomes()
        self._judge_dropped()
        return sorted(self.violations + self._books.violations)

    def _broken(self, by: Transition) -> list[str]:
        before, after = by.states
        allowed = _ALLOWED.get((by.role, before, after))
        if allowed is None:
            return [f"no {by.role} makes a row that is {before} {after or 'vanish'}"]
        columns, checks = allowed
        old, new = by.old or {}, by.new or {}
        broken = [text for text, check in checks.items() if not check(by, old, new)]
        if further := by.changed - columns:
            broken.append(f"columns {sorted(further)} stay what they are")
        if before is not None and self._rows.get(old["id"]) != old:
            broken.append("a row is what its last transition has made it")
        if by.role == "completes" and after != "running" and not self._is_outcome(by, new):
            broken.append("a completion writes an outcome of this attempt")
        if by.role == "rescue" and after != "running" and not self._was_touched(by):
            broken.append("a rescue takes a row at second sight")
        if by.role == "sweep" and by.delivery not in self._books.looked_for.get(by.actor, ()):
            broken.append("a sweep takes back what it has looked for")
        return broken

    def _is_outcome(self, by: Transition, new: Row) -> bool:
        return any(
            at <= by.at and (outcome.status, outcome.attempts) == (new["status"], new["attempts"])
            for at, outcome in self._books.outcomes.get((by.worker, by.delivery), ())
        )

    def _was_touched(self, by: Transition) -> bool:
        touched = self._touched.get((by.actor, by.delivery))
        return touched is not None and touched != by.xid

    def _follow(self, by: Transition) -> None:
        before, after = by.states
        self.counts[f"{by.role}: {before} -> {after}"] += 1
        self.trace.append((by.at, by.actor, f"    {by}"))
        row = by.next_delivery.row_id
        if by.new is None:
            self._rows.pop(row, None)
        else:
            self._rows[row] = by.new
        if "enqueued" in by.states:
            self._enqueued.setdefault(by.next_delivery, []).append(by)
        if by.role == "rescue" and after == "running":
            self._touched.setdefault((by.actor, by.delivery), by.xid)
        elif before == "running" and after != "running":
            assert by.old is not None
            self._over.add((by.old["worker"], by.delivery))

    def _judge_outcomes(self) -> None:
        """Each outcome of a worker that was not killed is written, unless its row was taken away."""
        for (worker, delivery), put in self._books.outcomes.items():
            if worker not in self._books.killed and (worker, delivery) not in self._over | self._books.overtaken:
                at, outcome = put[-1]
                self.violations.append((at, f"lost outcome: {worker} put {outcome.status} for {delivery.job_id}"))

    def _judge_dropped(self) -> None:
        """A claim drops no job of a row that is enqueued under that delivery, and due.

        A hand-over counts from its statement, not from its commit: the claim waits for that.
        """
        for dropped in () if self._books.was_restored else self._books.dropped:
            before = [by for by in self._enqueued.get(dropped.delivery, ()) if by.at < dropped.answered_at]
            if not before or before[-1].states[1] != "enqueued":
                continue
            if (before[-1].run_at or 0.0) < dropped.asked_at:
                text = f"lost job: {dropped.worker} drops {dropped.delivery.job_id}, which is enqueued and due"
                self.violations.append((dropped.answered_at, text))
