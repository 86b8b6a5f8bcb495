"""What the tester knows of workers that no row shows: what each holds, which handlers run, which outcomes were put."""

import time
from dataclasses import dataclass, field

from outbox.rq_jobs import Delivery
from outbox_worker.claim import Claim
from outbox_worker.outcome import Outcome


@dataclass
class Attempt:
    """One claim, for as long as its worker lives and has not settled it."""

    worker: str
    claim: Claim
    runs: bool = False
    """Whether the handler has begun and not ended."""
    is_excused: bool = False
    """Whether another may begin beside it: the lease of a worker that lives has passed, or the table was restored."""


@dataclass(frozen=True)
class Dropped:
    """A job that a claim dropped."""

    worker: str
    delivery: Delivery
    asked_at: float
    answered_at: float


@dataclass
class Books:
    """All of it, for one schedule."""

    attempts: dict[tuple[str, Delivery], Attempt] = field(default_factory=dict)
    outcomes: dict[tuple[str, Delivery], list[tuple[float, Outcome]]] = field(default_factory=dict)
    """All that were put, and when; by the workers that died as well."""
    killed: set[str] = field(default_factory=set)
    """Workers whose outcomes may be lost."""
    overtaken: set[tuple[str, Delivery]] = field(default_factory=set)
    """By worker and delivery: attempts during which the table was restored."""
    dropped: list[Dropped] = field(default_factory=list)
    looked_for: dict[str, set[Delivery]] = field(default_factory=dict)
    """By sweep: what its looks found missing."""
    was_restored: bool = False
    violations: list[tuple[float, str]] = field(default_factory=list)
    handled: int = 0

    def violate(self, text: str) -> None:
        """Takes note of something that must not happen."""
        self.violations.append((time.time(), text))

    def claimed(self, worker: str, claims: list[Claim], wanted: set[Delivery], asked_at: float) -> None:
        """Takes note of a claim's answer."""
        for claim in claims:
            others = [other for (_, held), other in self.attempts.items() if held == claim.delivery]
            if any(not other.is_excused for other in others):
                self.violate(f"double claim: {worker} claims {claim.delivery.job_id}, held by {others[0].worker}")
            self.attempts[worker, claim.delivery] = Attempt(worker, claim)
        got = {claim.delivery for claim in claims}
        self.dropped += [Dropped(worker, delivery, asked_at, time.time()) for delivery in sorted(wanted - got)]

    def begin(self, worker: str, claim: Claim) -> None:
        """Takes note of a handler that begins."""
        attempt = self.attempts[worker, claim.delivery]
        for other in self.attempts.values():
            if other is not attempt and other.claim.delivery.row_id == claim.delivery.row_id and other.runs:
                if other.is_excused or attempt.is_excused:
                    continue
                self.violate(
                    f"two handlers: {worker} begins {claim.delivery.job_id} while {other.worker} runs"
                    f" {other.claim.delivery.job_id}"
                )
        attempt.runs = True

    def put(self, worker: str, outcome: Outcome, *, runs_on: bool = False) -> None:
        """Takes note of an outcome; the handler has ended, or never begun, unless it runs on."""
        self.outcomes.setdefault((worker, outcome.delivery), []).append((time.time(), outcome))
        if outcome.status == "done":
            self.handled += 1
        if (attempt := self.attempts.get((worker, outcome.delivery))) and not runs_on:
            attempt.runs = False

    def settle(self, worker: str, held: set[Delivery]) -> None:
        """Takes note of what a worker still holds; what else it held is written, or no longer its own."""
        for key, attempt in list(self.attempts.items()):
            if key[0] == worker and key[1] not in held and not attempt.runs:
                del self.attempts[key]

    def end(self, worker: str, *, killed: bool) -> None:
        """Takes note that a worker's process is gone."""
        if killed:
            self.killed.add(worker)
        for key in [key for key in self.attempts if key[0] == worker]:
            del self.attempts[key]

    def excuse(self, rows: set[int], workers: set[str]) -> None:
        """Takes note that these rows' leases may have passed though these workers live."""
        for attempt in self.attempts.values():
            if attempt.claim.delivery.row_id in rows and attempt.worker in workers:
                attempt.is_excused = True

    def restored(self) -> None:
        """Takes note that the table was restored."""
        self.was_restored = True
        self.overtaken |= self.attempts.keys()
        for attempt in self.attempts.values():
            attempt.is_excused = True
