"""Records what no row shows: the claims that workers hold, running handlers, outcomes, and dropped jobs."""

import time
from dataclasses import dataclass, field

from outbox.rq_jobs import Delivery
from outbox_worker.claim import Claim
from outbox_worker.outcome import Outcome


@dataclass
class HeldClaim:
    """A claim whose worker is alive and has not settled it."""

    worker: str
    claim: Claim
    is_running: bool = False
    """Whether the handler has begun and not ended."""
    is_excused: bool = False
    """Whether another claim may run beside it: a live worker's lease has passed, or the table was restored."""


@dataclass(frozen=True)
class Dropped:
    """A job that was dropped by a claim."""

    worker: str
    delivery: Delivery
    asked_at: float
    answered_at: float


@dataclass
class Records:
    """The records of one schedule, and the violations noticed while it runs."""

    held_claims: dict[tuple[str, Delivery], HeldClaim] = field(default_factory=dict)
    outcomes: dict[tuple[str, Delivery], list[tuple[float, Outcome]]] = field(default_factory=dict)
    """All outcomes and their times, also those of workers that died."""
    killed: set[str] = field(default_factory=set)
    """Workers whose outcomes may be lost."""
    held_at_restore: set[tuple[str, Delivery]] = field(default_factory=set)
    """Worker and delivery of the claims that were held when the table was restored."""
    dropped: list[Dropped] = field(default_factory=list)
    found_missing: dict[str, set[Delivery]] = field(default_factory=dict)
    """The deliveries that each sweep found missing."""
    was_restored: bool = False
    violations: list[tuple[float, str]] = field(default_factory=list)

    def add_violation(self, text: str) -> None:
        """Records a violation."""
        self.violations.append((time.time(), text))

    def add_claims(self, worker: str, claims: list[Claim], requested: set[Delivery], asked_at: float) -> None:
        """Records the result of a claim."""
        for claim in claims:
            others = [other for (_, held), other in self.held_claims.items() if held == claim.delivery]
            if any(not other.is_excused for other in others):
                self.add_violation(f"double claim: {worker} claims {claim.delivery.job_id}, held by {others[0].worker}")
            self.held_claims[worker, claim.delivery] = HeldClaim(worker, claim)
        claimed = {claim.delivery for claim in claims}
        self.dropped += [Dropped(worker, delivery, asked_at, time.time()) for delivery in sorted(requested - claimed)]

    def begin(self, worker: str, claim: Claim) -> None:
        """Records that a handler begins."""
        held = self.held_claims[worker, claim.delivery]
        for other in self.held_claims.values():
            if other is not held and other.claim.delivery.row_id == claim.delivery.row_id and other.is_running:
                if other.is_excused or held.is_excused:
                    continue
                self.add_violation(
                    f"two handlers: {worker} begins {claim.delivery.job_id} while {other.worker} runs"
                    f" {other.claim.delivery.job_id}"
                )
        held.is_running = True

    def add_outcome(self, worker: str, outcome: Outcome, *, still_runs: bool = False) -> None:
        """Records an outcome, and that the handler has ended unless it still runs."""
        self.outcomes.setdefault((worker, outcome.delivery), []).append((time.time(), outcome))
        if (held := self.held_claims.get((worker, outcome.delivery))) and not still_runs:
            held.is_running = False

    def settle(self, worker: str, in_flight: set[Delivery]) -> None:
        """Removes a worker's claims that are not in flight: they are completed, or no longer its own."""
        for key, held in list(self.held_claims.items()):
            if key[0] == worker and key[1] not in in_flight and not held.is_running:
                del self.held_claims[key]

    def end(self, worker: str, *, killed: bool) -> None:
        """Records that a worker's process has ended."""
        if killed:
            self.killed.add(worker)
        for key in [key for key in self.held_claims if key[0] == worker]:
            del self.held_claims[key]

    def excuse(self, rows: set[int], workers: set[str]) -> None:
        """Records that the leases of these rows may have passed although these workers are alive."""
        for held in self.held_claims.values():
            if held.claim.delivery.row_id in rows and held.worker in workers:
                held.is_excused = True

    def add_restore(self) -> None:
        """Records that the table was restored."""
        self.was_restored = True
        self.held_at_restore |= self.held_claims.keys()
        for held in self.held_claims.values():
            held.is_excused = True
