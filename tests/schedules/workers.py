"""Defines workers with a claiming and a completing thread, as in the product. Handlers are steps, not threads."""

import time
from random import Random

import psycopg

from outbox.row import Status
from outbox.rq_jobs import Delivery
from outbox.runtime.postgres import AWAY, Connection
from outbox_worker.claim import Claim, claim, claim_free
from outbox_worker.in_flight import InFlight
from outbox_worker.leases import Leases
from outbox_worker.outcome import Outcome, cut_short, given_back
from outbox_worker.outcomes import Outcomes
from outbox_worker.worker import LEAVING_TIME
from tests.schedules.actor import TURN, Actor
from tests.schedules.relays import LEASE
from tests.schedules.shared_state import SharedState

MAX_HELD = 6


class Worker:
    """One worker process."""

    def __init__(self, name: str, state: SharedState) -> None:
        self.name = name
        self.state = state
        self.in_flight = InFlight()
        self.leases = Leases(self.in_flight, name, LEASE)
        self.outcomes = Outcomes(self.in_flight, name)
        self.is_alive = True
        self.is_frozen = False
        """Whether it is paused, so that its leases may pass."""
        self.is_stopping = False
        """Whether it takes no more jobs."""
        self.is_leaving = False
        """Whether it has given back the rows of unfinished handlers."""
        self._waiting: list[Claim] = []
        self._running: dict[Delivery, Claim] = {}
        self._draw = Random(f"{state.seed} {name} handlers")
        self.claims = ClaimThread(self)
        self.completes = CompletionThread(self)

    def hold(self, claims: list[Claim]) -> None:
        """Adds claimed rows."""
        self.in_flight.hold(claims)
        self._waiting += claims

    @property
    def has_room(self) -> bool:
        """Whether it takes more jobs."""
        return len(self._waiting) + len(self._running) < MAX_HELD and not self.is_stopping

    @property
    def has_handlers(self) -> bool:
        """Whether it has handlers to begin or to end."""
        return bool(self._waiting or self._running)

    @property
    def is_busy(self) -> bool:
        """Whether it can step a handler now."""
        return self.has_handlers and not self.is_frozen

    def running_rows(self) -> set[int]:
        """Returns the ids of rows with a running handler."""
        return {delivery.row_id for delivery in self._running}

    def step_handlers(self) -> None:
        """Begins or ends a handler, or gives back a row that no handler has begun."""
        draw = self._draw
        if self._waiting and (not self._running or draw.random() < 0.5) and not self.is_leaving:
            claimed = self._waiting.pop(0)
            if draw.random() < 0.15 and not self.state.is_fair:
                self._put(given_back(claimed))
            else:
                self._running[claimed.delivery] = claimed
                self._note(f"begins {claimed.delivery.job_id}")
                self.state.records.begin(self.name, claimed)
        elif self._running:
            claimed = self._running.pop(draw.choice(list(self._running)))
            self._put(self._outcome(claimed))

    def _outcome(self, claimed: Claim) -> Outcome:
        chance = 0.0 if self.state.is_fair else self._draw.random()
        if chance < 0.5:
            return Outcome(claimed.delivery, Status.DONE, claimed.attempt)
        if chance < 0.6:
            return Outcome(claimed.delivery, Status.DEAD, claimed.attempt, error="SkipRetry")
        return cut_short(claimed, "failed", self._draw.choice([0.0, 20.0, 1000.0]))

    def _put(self, outcome: Outcome, *, still_runs: bool = False) -> None:
        self._note(f"puts {outcome.status} for {outcome.delivery.job_id}")
        self.state.records.add_outcome(self.name, outcome, still_runs=still_runs)
        self.in_flight.put(outcome)

    def _note(self, text: str) -> None:
        self.state.note(self.name, text)

    def leave(self) -> None:
        """Gives back all rows, as a stopping worker does when its grace is over."""
        for claimed in self._waiting:
            self._put(given_back(claimed))
        self._waiting.clear()
        for claimed in self._running.values():
            self._put(cut_short(claimed, "stopped", LEAVING_TIME), still_runs=True)
        self.is_leaving = True

    def exit_if_done(self) -> bool:
        """Ends a leaving worker if all its outcomes are settled; returns whether its process has ended."""
        if self.is_alive and self.is_leaving and not self.completes.has_outcomes:
            self._note("exits")
            self.end(killed=False)
        return not self.is_alive

    def end(self, *, killed: bool) -> None:
        """Records that the process has ended; the server may still execute what its threads wait for."""
        self.is_alive = False
        self.claims.is_doomed = self.completes.is_doomed = True
        self.state.records.end(self.name, killed=killed)


class WorkerThread(Actor):
    """One of a worker's two threads."""

    def __init__(self, name: str, worker: Worker, seed: str) -> None:
        """Creates the thread. The seed decides which schedules catch which mutant, and is independent of the name."""
        state = worker.state
        super().__init__(f"{worker.name}.{name}", state.arrived, state.note)
        self.worker = worker
        self.state = state
        self.draw = Random(f"{state.seed} {worker.name}.{seed}")

    def work(self) -> None:
        """Takes turns on one connection after another."""
        while True:
            connection = self.state.database.connect(self)
            try:
                while not connection.closed:
                    self._carried = None
                    self.turn(connection)
            except AWAY as error:
                self.note(self.name, f"  {type(error).__name__}: {error}")

    def turn(self, connection: Connection) -> None:
        """Performs one task."""
        raise NotImplementedError


class ClaimThread(WorkerThread):
    """Takes jobs and claims their rows."""

    begins_at_once = False  # a popped job is in no list until it is claimed

    def __init__(self, worker: Worker) -> None:
        super().__init__("claims", worker, "claims")
        self._taken: list[Delivery] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is no job for it, or no room for one."""
        if self.worker.is_leaving or self.worker.is_frozen:
            return True
        return not self._taken and not self.worker.is_stopping and (
            self.state.redis.is_empty or not self.worker.has_room
        )  # fmt: skip

    def turn(self, connection: Connection) -> None:
        """Takes and claims jobs, as `Claimer.claim` in worker/outbox_worker/claimer.py."""
        if not self._taken:
            self.stop_before(TURN)
            if self.worker.is_stopping:
                if not self.worker.is_leaving:
                    self.worker.leave()
                return
            if self.worker.has_room:
                self._taken += self.state.redis.take(self.draw.randint(1, 4), self.draw)
        if self._taken:
            held, asked_at = self.worker.in_flight.deliveries(), time.time()
            try:
                claims = claim(connection, self._taken, self.worker.name, LEASE, held)
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                self.note(self.name, "  claim timed out")
                claims, _ = claim_free(connection, self._taken, self.worker.name, LEASE, held)
                asked = {claimed.delivery for claimed in claims}
            else:
                rows = {delivery.row_id for delivery in held}
                asked = {delivery for delivery in self._taken if delivery.row_id not in rows}
            self.state.records.add_claims(self.worker.name, claims, asked, asked_at)
            self._taken.clear()
            self.worker.hold(claims)


class CompletionThread(WorkerThread):
    """Writes outcomes and renews leases, by the product's code except for its thread and its waits."""

    def __init__(self, worker: Worker) -> None:
        super().__init__("completes", worker, "marks")

    @property
    def has_outcomes(self) -> bool:
        """Whether there are unsettled outcomes."""
        outcomes = self.worker.outcomes
        return self.worker.in_flight.has_outcomes or bool(outcomes.kept) or bool(outcomes.refused)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to write or to renew."""
        return self.worker.is_frozen or (not self.has_outcomes and not self.worker.in_flight.deliveries())

    def turn(self, connection: Connection) -> None:
        """Does one round of `_serve` in worker/outbox_worker/complete.py."""
        self.stop_before(TURN)
        leases, outcomes = self.worker.leases, self.worker.outcomes
        try:
            if self.state.is_fair or self.draw.random() < 0.25:
                leases.renew(connection)
                outcomes.retry_refused()
            if self.state.is_fair or self.draw.random() < 0.5:
                outcomes.retry_locked()
                leases.renew_missed(connection)
            outcomes.add(self.worker.in_flight.collect(0.0))
            if outcomes.ready:
                outcomes.write(connection)
        except psycopg.errors.LockNotAvailable:
            self.note(self.name, "  outcomes wait for a lock")
        self.state.records.settle(self.worker.name, set(self.worker.in_flight.deliveries()))
