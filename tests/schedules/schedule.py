"""One schedule: steps in random order and faults between them, then a fair phase, then the verdict."""

import random
from collections import Counter
from dataclasses import dataclass
from unittest.mock import patch

import outbox_relay.publish
import outbox_relay.rescue
import outbox_relay.sweep
from outbox.runtime import logs
from outbox.runtime.settings import RelaySettings
from tests.schedules.clients import Adder, Foreign, Operator
from tests.schedules.faults import Faults
from tests.schedules.journal import Journal
from tests.schedules.judge import Judge
from tests.schedules.relays import Duty, Relay, Rescue, Retention, Sweep
from tests.schedules.setting import Setting
from tests.schedules.stage import Stage
from tests.schedules.stepper import Stepper
from tests.schedules.stepping import END_OF_TRANSACTION, TURN, Actor, Order
from tests.schedules.workers import Part, Worker

_ROUNDS = 25
"""Rounds of the fair phase in which every row must end. A rescue that is paused needs five of them, a sweep two."""

_TURN_LIMIT = 200
"""Steps that all actors may take until each has ended its turn, when the fair phase begins."""


@dataclass
class Verdict:
    """What came of a schedule."""

    seed: str
    violations: list[tuple[float, str]]
    trace: list[tuple[float, str, str]]
    """When, who, and what."""
    counts: Counter[str]
    """Steps, transitions, faults and waits."""


def run(stage: Stage, seed: str) -> Verdict:
    """Runs one schedule on emptied tables.

    Raises:
        StuckError: a statement neither answers nor waits for a lock.
        Exception: what an actor raised that its process would not survive.
    """
    stage.reset()
    settings = RelaySettings(
        database_url="postgresql://", redis_url="redis://", batch=4, window=7, sweep_grace=60, retention=86_400
    )
    setting = Setting(stage, seed, settings)
    random.seed(seed)  # the product draws its backoff from it
    journal = Journal(setting)
    with (
        patch.object(outbox_relay.publish, "write_jobs", lambda client, rows: client.write_jobs(rows)),
        patch.object(outbox_relay.sweep, "held_deliveries", lambda client, _: client.held()),
        patch.object(outbox_relay.rescue, "time", setting.clock),
        patch.object(logs, "get", lambda: journal),
    ):
        return _Schedule(setting).run()


class _Schedule:
    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._draw = setting.draw
        self._stepper = Stepper(setting.stage, setting.arrived)
        self._faults = Faults(setting)
        self._counts: Counter[str] = Counter()
        self._duties: list[Duty] = []
        self._workers_made = 0
        self._stickiness = self._draw.choice([0.0, 0.3, 0.7])
        self._commit_pace = self._draw.choice([1.0, 0.1])
        """Where it is low, locks are held for longer."""
        self._weights: dict[str, float] = {}
        self._last: Actor | None = None

    def run(self) -> Verdict:
        """Runs it."""
        setting = self._setting
        try:
            self._set_up()
            for _ in range(self._draw.randint(60, 130)):
                if not self._stepper.failures:
                    self._do_anything()
            if not self._stepper.failures:
                self._finish()
        finally:
            self._stepper.end()
        for failure in self._stepper.failures:
            setting.books.violate(failure)
        self._judge_deadlocks()
        judge = Judge(setting.books)
        violations = judge.judge(setting.stage.transitions())
        trace = sorted([*setting.trace, *judge.trace])
        return Verdict(setting.seed, violations, trace, self._counts + judge.counts)

    def _judge_deadlocks(self) -> None:
        """The project's own statements run into none among themselves.

        With a foreign session they may: it waits FOR UPDATE for a row that a relay has not committed and that another
        session has locked FOR KEY SHARE; a claim that waits for the same relay then locks the row's new version first
        and needs the old one's lock once more. Beside such a session two claims of one row may do so as well: the one
        that is refused claims again what is free.
        """
        has_foreign = any(isinstance(duty, Foreign) for duty in self._duties)
        for names in self._stepper.deadlocks:
            if any(name.startswith("foreign") for name in names):
                self._counts["deadlocks with a foreign session"] += 1
            elif has_foreign and all(name.endswith(".claims") for name in names):
                self._counts["deadlocks of claims beside a foreign session"] += 1
            else:
                self._setting.books.violate(f"deadlock: {', '.join(names)}")

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
                duty = kind(f"{kind.__name__.lower()}-{number}", self._setting)
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
        worker = Worker(f"worker-{self._workers_made}", self._setting)
        self._setting.workers.append(worker)
        for part in (worker.claims, worker.completes):
            self._weights[part.name] = self._draw.choice([0.5, 1.0, 2.0, 4.0])
            self._stepper.start(part)

    def _do_anything(self) -> None:
        draw = self._draw
        for worker in list(self._setting.workers):
            self._replace_exited(worker)
        if self._stepper.blocked and draw.random() < self._faults.time_out_rate:
            blocked = draw.choice(sorted(self._stepper.blocked, key=lambda actor: actor.name))
            self._counts["waits for a lock that time out"] += 1
            self._note("-", f"{blocked.name} has waited too long for a lock")
            self._stepper.time_out(blocked)
        chance = draw.random()
        if chance < 0.2:
            what = self._faults.happen(self._end_turns)
            self._counts[": ".join(what.split(": ")[:2])] += 1
            self._note("-", what)
        elif chance < 0.205:
            worker = draw.choice(self._setting.workers)
            self._note(worker.name, "is told to stop")
            worker.is_stopping = True
        elif chance < 0.35 and (busy := [worker for worker in self._setting.workers if worker.is_busy]):
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
            and not (isinstance(actor, Part) and actor.worker.is_frozen)
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
        if order is Order.CRASH and isinstance(actor, Part):
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
        self._setting.workers.remove(worker)
        for part in (worker.claims, worker.completes):
            if part not in self._stepper.blocked:
                self._stepper.step(part, Order.CRASH)
        self._start_worker()

    def _note(self, who: str, what: str) -> None:
        self._setting.note(who, what)

    def _finish(self) -> None:
        """Lets everything end: nothing goes wrong any more, time passes, and all go on in turn."""
        self._setting.is_fair = True
        for worker in self._setting.workers:
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
            for worker in list(self._setting.workers):
                self._finish_worker(worker)
        self._setting.books.violate(f"rows have not ended: {self._setting.stage.rows()}")

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
        return all(row["status"] in {"done", "dead"} for row in self._setting.stage.rows()) and not any(
            worker.completes.has_outcomes for worker in self._setting.workers
        )

    def _end_turns(self) -> None:
        for _ in range(_TURN_LIMIT):
            going = [actor for actor in self._stepper.actors if actor.gate != TURN]
            if self._stepper.failures:
                return
            ready = [actor for actor in going if actor not in self._stepper.blocked]
            if not going:
                return
            if not ready:
                break
            self._step(ready[0])
        raise AssertionError(f"turns do not end: {[actor.name for actor in going]}")

    def _take_turn(self, actor: Actor) -> None:
        self._step(actor)
        while actor.gate != TURN and not actor.is_over:
            if actor in self._stepper.blocked:
                raise AssertionError(f"{actor.name} waits for a lock that nobody holds")
            self._step(actor)
