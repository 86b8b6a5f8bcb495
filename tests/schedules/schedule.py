"""Runs one schedule: steps in random order with faults between them, a fair phase, and the verdict."""

import random
from collections import Counter
from dataclasses import dataclass
from unittest.mock import patch

import outbox_relay.publish
import outbox_relay.rescue
import outbox_relay.sweep
from outbox.runtime import logs
from outbox.runtime.settings import RelaySettings
from tests.schedules.actor import END_OF_TRANSACTION, TURN, Actor, Order
from tests.schedules.clients import Adder, Foreign, Operator
from tests.schedules.database import Database
from tests.schedules.faults import Faults
from tests.schedules.judge import Judge
from tests.schedules.relays import Duty, Relay, Rescue, Retention, Sweep
from tests.schedules.shared_state import SharedState
from tests.schedules.stepper import Stepper
from tests.schedules.trace_logger import TraceLogger
from tests.schedules.workers import Worker, WorkerThread

_ROUNDS = 25
"""Rounds of the fair phase within which every row must end. A paused rescue needs five of them, a sweep two."""

_TURN_LIMIT = 200
"""Maximum number of steps until all actors have ended their turns."""


@dataclass
class Verdict:
    """The result of a schedule."""

    seed: str
    violations: list[tuple[float, str]]
    trace: list[tuple[float, str, str]]
    """Time, actor and text of each line."""
    counts: Counter[str]
    """Steps, transitions, faults and waits."""


def run(database: Database, seed: str) -> Verdict:
    """Runs one schedule on emptied tables.

    Raises:
        StuckError: a statement neither answers nor waits for a lock.
    """
    database.reset()
    settings = RelaySettings(
        database_url="postgresql://", redis_url="redis://", batch=4, window=7, sweep_grace=60, retention=86_400
    )
    state = SharedState(database, seed, settings)
    random.seed(seed)  # the product's backoff uses it
    trace_logger = TraceLogger(state)
    with (
        patch.object(outbox_relay.publish, "write_jobs", lambda client, rows: client.write_jobs(rows)),
        patch.object(outbox_relay.sweep, "held_deliveries", lambda client, _: client.held()),
        patch.object(outbox_relay.rescue, "time", state.clock),
        patch.object(logs, "get", lambda: trace_logger),
    ):
        return _Schedule(state).run()


class _Schedule:
    def __init__(self, state: SharedState) -> None:
        self._state = state
        self._draw = state.draw
        self._stepper = Stepper(state.database, state.arrived)
        self._faults = Faults(state)
        self._counts: Counter[str] = Counter()
        self._duties: list[Duty] = []
        self._workers_made = 0
        self._stickiness = self._draw.choice([0.0, 0.3, 0.7])
        self._commit_pace = self._draw.choice([1.0, 0.1])
        """Relative weight of the ends of transactions; if it is low, locks are held longer."""
        self._weights: dict[str, float] = {}
        self._last: Actor | None = None

    def run(self) -> Verdict:
        """Runs the schedule, and judges it."""
        state = self._state
        try:
            self._set_up()
            for _ in range(self._draw.randint(60, 130)):
                if not self._stepper.failures:
                    self._do_random()
            if not self._stepper.failures:
                self._finish()
        finally:
            self._stepper.end()
        for failure in self._stepper.failures:
            state.records.add_violation(failure)
        self._judge_deadlocks()
        judge = Judge(state.records)
        violations = judge.judge(state.database.transitions())
        trace = sorted([*state.trace, *judge.trace])
        return Verdict(state.seed, violations, trace, self._counts + judge.counts)

    def _judge_deadlocks(self) -> None:
        """Records a violation for each deadlock among the product's own statements.

        With a foreign session they may deadlock: it waits FOR UPDATE for a row that a relay has not committed and that
        another session has locked FOR KEY SHARE; a claim that waits for the same relay then locks the row's new version
        first and needs the old one's lock as well. Beside such a session, two claims of one row may also deadlock: the
        one that is cancelled then claims only free rows.
        """
        has_foreign = any(isinstance(duty, Foreign) for duty in self._duties)
        for names in self._stepper.deadlocks:
            if any(name.startswith("foreign") for name in names):
                self._counts["deadlocks with a foreign session"] += 1
            elif has_foreign and all(name.endswith(".claims") for name in names):
                self._counts["deadlocks of claims beside a foreign session"] += 1
            else:
                self._state.records.add_violation(f"deadlock: {', '.join(names)}")

    def _set_up(self) -> None:
        draw = self._draw
        kinds: list[tuple[type[Duty], int, float]] = [
            (Adder, draw.choice([1, 1, 2]), 1.0),
            (Relay, draw.choice([1, 2, 2]), 3.0),
            (Sweep, draw.choice([0, 1, 1, 2]), 1.0),
            (Rescue, draw.choice([0, 1, 1, 2]), 3.0),
            (Operator, draw.choice([0, 0, 1, 2]), 1.0),
            (Retention, draw.choice([0, 0, 1]), 0.2),
            (Foreign, draw.choice([0, 0, 1, 2]), 0.7),
        ]
        for kind, count, weight in kinds:
            for number in range(1, max(count, kind in {Relay, Sweep, Rescue}) + 1):
                duty = kind(f"{kind.__name__.lower()}-{number}", self._state)
                self._duties.append(duty)
                self._weights[duty.name] = weight * draw.choice([0.5, 1, 1, 2]) if number <= count else 0.0
                self._stepper.start(duty)
        for _ in range(draw.choice([2, 2, 3] if self._faults.restores else [1, 2, 2, 3])):
            self._start_worker()
        self._take_turn(self._duties[0])
        self._take_turn(self._duties[0])
        self._faults.begin()

    def _start_worker(self) -> None:
        self._workers_made += 1
        worker = Worker(f"worker-{self._workers_made}", self._state)
        self._state.workers.append(worker)
        for part in (worker.claims, worker.completes):
            self._weights[part.name] = self._draw.choice([0.5, 1.0, 2.0, 4.0])
            self._stepper.start(part)

    def _do_random(self) -> None:
        draw = self._draw
        for worker in list(self._state.workers):
            self._replace_exited(worker)
        if self._stepper.blocked and draw.random() < self._faults.time_out_rate:
            blocked = draw.choice(sorted(self._stepper.blocked, key=lambda actor: actor.name))
            self._counts["waits for a lock that time out"] += 1
            self._note("-", f"{blocked.name} times out waiting for a lock")
            self._stepper.time_out(blocked)
        chance = draw.random()
        if chance < 0.2:
            event = self._faults.inject(self._end_turns)
            self._counts[": ".join(event.split(": ")[:2])] += 1
            self._note("-", event)
        elif chance < 0.205:
            worker = draw.choice(self._state.workers)
            self._note(worker.name, "is asked to stop")
            worker.is_stopping = True
        elif chance < 0.35 and (busy := [worker for worker in self._state.workers if worker.is_busy]):
            worker = draw.choice(busy)
            for _ in range(draw.choice([1, 1, 2, 3])):
                worker.step_handlers()
        else:
            self._step_any()

    def _step_any(self) -> None:
        ready = [
            actor
            for actor in self._stepper.actors
            if actor not in self._stepper.blocked
            and not (actor.gate == TURN and actor.is_idle)
            and not (isinstance(actor, WorkerThread) and actor.worker.is_frozen)
        ]
        if self._last in ready and self._last.gate != TURN and self._draw.random() < self._stickiness:
            actor = self._last
        else:
            weights = [
                self._weights[actor.name] * (self._commit_pace if actor.gate == END_OF_TRANSACTION else 1.0)
                for actor in ready
            ]
            if not any(weights):
                return
            actor = self._draw.choices(ready, weights)[0]
        self._last = actor
        order = Order.GO
        if self._draw.random() < self._faults.connection_rate:
            order = self._draw.choice([Order.CUT, Order.LOSE_ANSWER, Order.CRASH])
            self._counts[f"fault: {order.value}"] += 1
        self._step(actor, order)

    def _step(self, actor: Actor, order: Order = Order.GO) -> None:
        if actor.is_over:
            return
        if order is Order.CRASH and isinstance(actor, WorkerThread):
            self._note(actor.worker.name, "is killed")
            actor.worker.end(killed=True)
            self._remove(actor.worker)
        else:
            self._counts["steps"] += 1
            self._note(actor.name, actor.gate if order is Order.GO else f"{actor.gate} ({order.value})")
            self._stepper.step(actor, order)
            if actor in self._stepper.blocked:
                self._counts["steps that wait for a lock"] += 1
                self._note(actor.name, "  waits for a lock")

    def _replace_exited(self, worker: Worker) -> None:
        if worker.exit_if_done():
            self._remove(worker)

    def _remove(self, worker: Worker) -> None:
        self._state.workers.remove(worker)
        for part in (worker.claims, worker.completes):
            if part not in self._stepper.blocked:
                self._stepper.step(part, Order.CRASH)
        self._start_worker()

    def _note(self, actor: str, text: str) -> None:
        self._state.note(actor, text)

    def _finish(self) -> None:
        """Runs the fair phase: no more faults, time passes, and actors take turns until every row has ended."""
        self._state.is_fair = True
        for worker in self._state.workers:
            worker.is_frozen = False
        self._note("-", "the fair phase begins")
        self._end_turns()
        for actor in self._stepper.actors:
            actor.stops = False
        for round_ in range(_ROUNDS):
            if self._stepper.failures:
                return
            if self._is_finished():
                self._counts[f"fair rounds: {round_}"] += 1
                return
            self._faults.pass_all()
            for kind in (Rescue, Sweep, Relay):
                self._take_turn(next(duty for duty in self._duties if isinstance(duty, kind)))
            for worker in list(self._state.workers):
                self._finish_worker(worker)
        self._state.records.add_violation(f"rows have not ended: {self._state.database.rows()}")

    def _finish_worker(self, worker: Worker) -> None:
        while not worker.claims.is_idle and not worker.claims.is_over:
            self._take_turn(worker.claims)
            while worker.has_handlers and not worker.is_leaving:
                worker.step_handlers()
        while worker.has_handlers and not worker.is_leaving:
            worker.step_handlers()
        if not worker.completes.is_idle:
            self._take_turn(worker.completes)
        self._replace_exited(worker)

    def _is_finished(self) -> bool:
        return all(row["status"] in {"done", "dead"} for row in self._state.database.rows()) and not any(
            worker.completes.has_outcomes for worker in self._state.workers
        )

    def _end_turns(self) -> None:
        for _ in range(_TURN_LIMIT):
            unfinished = [actor for actor in self._stepper.actors if actor.gate != TURN]
            if self._stepper.failures:
                return
            ready = [actor for actor in unfinished if actor not in self._stepper.blocked]
            if not unfinished:
                return
            if not ready:
                break
            self._step(ready[0])
        raise AssertionError(f"turns do not end: {[actor.name for actor in unfinished]}")

    def _take_turn(self, actor: Actor) -> None:
        self._step(actor)
        while actor.gate != TURN and not actor.is_over:
            if actor in self._stepper.blocked:
                raise AssertionError(f"{actor.name} waits for a lock that no actor holds")
            self._step(actor)
