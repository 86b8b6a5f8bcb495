"""Workers: each has a thread that claims and one that completes, as in the product. Handlers are steps, not threads."""

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
from tests.schedules.relays import LEASE
from tests.schedules.setting import Setting
from tests.schedules.stepping import TURN, Actor

MOST_HELD = 6


class Worker:
    """One worker process."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name
        self.setting = setting
        self.in_flight = InFlight()
        self.leases = Leases(self.in_flight, name, LEASE)
        self.outcomes = Outcomes(self.in_flight, name)
        self.is_alive = True
        self.is_frozen = False
        """Whether it does nothing for a while, and its leases may pass."""
        self.is_stopping = False
        """Whether it takes no more jobs."""
        self.is_leaving = False
        """Whether it has given back what its handlers have not ended."""
        self._waiting: list[Claim] = []
        self._running: dict[Delivery, Claim] = {}
        self._draw = Random(f"{setting.seed} {name} handlers")
        self.claims = Claims(self)
        self.completes = Completes(self)

    def hold(self, claims: list[Claim]) -> None:
        """Takes what was claimed."""
        self.in_flight.hold(claims)
        self._waiting += claims

    @property
    def has_room(self) -> bool:
        """Whether it takes more jobs."""
        return len(self._waiting) + len(self._running) < MOST_HELD and not self.is_stopping

    @property
    def has_handlers(self) -> bool:
        """Whether there is anything to begin or to end."""
        return bool(self._waiting or self._running)

    @property
    def is_busy(self) -> bool:
        """Whether it goes on with any now."""
        return self.has_handlers and not self.is_frozen

    def running_rows(self) -> set[int]:
        """Returns the rows whose handlers run."""
        return {delivery.row_id for delivery in self._running}

    def step_handlers(self) -> None:
        """Begins a handler, or ends one, or gives back what no handler has begun."""
        draw = self._draw
        if self._waiting and (not self._running or draw.random() < 0.5) and not self.is_leaving:
            claimed = self._waiting.pop(0)
            if draw.random() < 0.15 and not self.setting.is_fair:
                self._put(given_back(claimed))
            else:
                self._running[claimed.delivery] = claimed
                self._note(f"begins {claimed.delivery.job_id}")
                self.setting.books.begin(self.name, claimed)
        elif self._running:
            claimed = self._running.pop(draw.choice(list(self._running)))
            self._put(self._outcome(claimed))

    def _outcome(self, claimed: Claim) -> Outcome:
        chance = 0.0 if self.setting.is_fair else self._draw.random()
        if chance < 0.5:
            return Outcome(claimed.delivery, Status.DONE, claimed.attempt)
        if chance < 0.6:
            return Outcome(claimed.delivery, Status.DEAD, claimed.attempt, error="SkipRetry")
        return cut_short(claimed, "failed", self._draw.choice([0.0, 20.0, 1000.0]))

    def _put(self, outcome: Outcome, *, runs_on: bool = False) -> None:
        self._note(f"puts {outcome.status} for {outcome.delivery.job_id}")
        self.setting.books.put(self.name, outcome, runs_on=runs_on)
        self.in_flight.put(outcome)

    def _note(self, what: str) -> None:
        self.setting.note(self.name, what)

    def leave(self) -> None:
        """Gives back what it has, as a worker does that is told to stop and whose grace is over."""
        for claimed in self._waiting:
            self._put(given_back(claimed))
        self._waiting.clear()
        for claimed in self._running.values():
            self._put(cut_short(claimed, "stopped", LEAVING_TIME), runs_on=True)
        self.is_leaving = True

    def exit_if_done(self) -> bool:
        """Ends the process, if all outcomes of a leaving worker are settled, and returns whether it has ended."""
        if self.is_alive and self.is_leaving and not self.completes.has_outcomes:
            self._note("exits")
            self.end(killed=False)
        return not self.is_alive

    def end(self, *, killed: bool) -> None:
        """Takes note that the process is gone; what its threads wait for, the server may still do."""
        self.is_alive = False
        self.claims.is_doomed = self.completes.is_doomed = True
        self.setting.books.end(self.name, killed=killed)


class Part(Actor):
    """One of a worker's two threads."""

    def __init__(self, name: str, worker: Worker, draws: str) -> None:
        """Takes its name, its worker, and what seeds its draws: that decides which schedules catch which mutant."""
        setting = worker.setting
        super().__init__(f"{worker.name}.{name}", setting.arrived, setting.note)
        self.worker = worker
        self.setting = setting
        self.draw = Random(f"{setting.seed} {worker.name}.{draws}")

    def work(self) -> None:
        """Serves on one connection after the other."""
        while True:
            connection = self.setting.stage.connect(self)
            try:
                while not connection.closed:
                    self._carried = None
                    self.turn(connection)
            except AWAY as error:
                self.note(self.name, f"  {type(error).__name__}: {error}")

    def turn(self, connection: Connection) -> None:
        """Does one task."""
        raise NotImplementedError


class Claims(Part):
    """Takes jobs and claims their rows."""

    begins_at_once = False  # between its pop and its claim a job is nowhere

    def __init__(self, worker: Worker) -> None:
        super().__init__("claims", worker, "claims")
        self._taken: list[Delivery] = []

    @property
    def is_idle(self) -> bool:
        """Whether it would find no job, or has no room for one."""
        if self.worker.is_leaving or self.worker.is_frozen:
            return True
        return not self._taken and not self.worker.is_stopping and (
            self.setting.bag.is_empty or not self.worker.has_room
        )  # fmt: skip

    def turn(self, connection: Connection) -> None:
        """As `Claimer.claim` in worker/outbox_worker/claimer.py."""
        if not self._taken:
            self.stop_before(TURN)
            if self.worker.is_stopping:
                if not self.worker.is_leaving:
                    self.worker.leave()
                return
            if self.worker.has_room:
                self._taken += self.setting.bag.take(self.draw.randint(1, 4), self.draw)
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
            self.setting.books.claimed(self.worker.name, claims, asked, asked_at)
            self._taken.clear()
            self.worker.hold(claims)


class Completes(Part):
    """Writes outcomes and renews leases, with the product's own parts but for its thread and its waits."""

    def __init__(self, worker: Worker) -> None:
        super().__init__("completes", worker, "marks")

    @property
    def has_outcomes(self) -> bool:
        """Whether any is unsettled."""
        outcomes = self.worker.outcomes
        return self.worker.in_flight.has_outcomes or bool(outcomes.kept) or bool(outcomes.refused)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to write or to renew."""
        return self.worker.is_frozen or (not self.has_outcomes and not self.worker.in_flight.deliveries())

    def turn(self, connection: Connection) -> None:
        """One round of `_serve` in worker/outbox_worker/complete.py."""
        self.stop_before(TURN)
        leases, outcomes = self.worker.leases, self.worker.outcomes
        try:
            if self.setting.is_fair or self.draw.random() < 0.25:
                leases.renew(connection)
                outcomes.retry_refused()
            if self.setting.is_fair or self.draw.random() < 0.5:
                outcomes.retry_locked()
                leases.renew_missed(connection)
            outcomes.add(self.worker.in_flight.collect(0.0))
            if outcomes.ready:
                outcomes.write(connection)
        except psycopg.errors.LockNotAvailable:
            self.note(self.name, "  outcomes wait for a lock")
        self.setting.books.settle(self.worker.name, set(self.worker.in_flight.deliveries()))
