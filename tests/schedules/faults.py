"""Injects events from outside: time passes, Redis fails, clocks jump, a dump is restored."""

from collections.abc import Callable

from tests.schedules.shared_state import MAX_ROWS, SharedState

_ROUND = 8.0
"""Seconds of the schedule's clock per round of the fair phase; more than 11 between two looks pause a rescue."""


class Faults:
    """The faults of one schedule; which of them occur at all is random."""

    def __init__(self, state: SharedState) -> None:
        self._state = state
        self._draw = draw = state.draw
        self.connection_rate = draw.choice([0.0, 0.0, 0.03, 0.06, 0.12])
        """Share of steps at which the connection is lost or the process killed."""
        self.time_out_rate = draw.choice([0.0, 0.02, 0.1])
        """Share of steps at which a wait for a lock times out, if there is one."""
        self._redis_rate = draw.choice([0.0, 0.1, 0.3, 0.6])
        self._freezes = draw.random() < 0.5
        self._sets_clock_back = draw.random() < 0.1
        self.restores = draw.random() < 0.2

    def inject(self, end_turns: Callable[[], None]) -> str:
        """Injects a random event, and returns its description.

        Args:
            end_turns: ends all transactions, as a restore of the table requires.
        """
        draw = self._draw
        if self.restores and draw.random() < 0.4:
            if draw.random() < 0.1:
                return self._dump()
            if self._held():
                end_turns()
                return self._restore()
        if draw.random() < self._redis_rate:
            return f"Redis: {self._state.redis.inject_fault(draw)}"
        events: list[Callable[[], str]] = [self._come_due, self._come_due, self._age, *[self._expire] * 4]
        events += [self._tick, self._move_due, self._move_due, self._retire]
        if self._freezes:
            events += [self._freeze, self._freeze, self._thaw]
        if self._sets_clock_back:
            events.append(self._set_clock_back)
        return draw.choice(events)()

    def begin(self) -> None:
        """Makes the first dump, if the schedule has a restore."""
        if self.restores:
            self._dump()

    def _dump(self) -> str:
        self._state.database.dump()
        return "dump"

    def _restore(self) -> str:
        self._state.database.restore()
        self._state.records.add_restore()
        self.restores = self._draw.random() < 0.5
        for worker in self._state.workers:
            worker.is_frozen |= bool(worker.in_flight.deliveries()) and self._draw.random() < 0.5
        return "restore"

    def pass_all(self) -> None:
        """Makes all times pass that rows wait for, except leases that workers renew."""
        all_rows = set(range(1, MAX_ROWS * 3))
        for delivery, run_at in self._state.database.pass_time("run_at", all_rows - self._state.leaving_rows()):
            self._state.redis.reschedule(delivery, run_at)
        self._state.database.pass_time("enqueued_at", all_rows)
        self._state.database.pass_time("lease_until", all_rows - self._held())
        self._state.redis.move_due(None)
        self._state.clock.now += _ROUND

    def _choose_rows(self) -> set[int]:
        return {row for row in range(1, MAX_ROWS + 3) if self._draw.random() < 0.8}

    def _held(self) -> set[int]:
        return {delivery.row_id for worker in self._state.workers for delivery in worker.in_flight.deliveries()}

    def _come_due(self) -> str:
        rows = self._choose_rows() - self._state.leaving_rows()
        for delivery, run_at in self._state.database.pass_time("run_at", rows):
            self._state.redis.reschedule(delivery, run_at)
        return f"time: rows come due: {sorted(rows)}"

    def _age(self) -> str:
        rows = self._choose_rows()
        self._state.database.pass_time("enqueued_at", rows)
        return f"time: the sweep's grace passes: {sorted(rows)}"

    def _expire(self) -> str:
        """Makes leases pass, except those that workers can renew because they are not frozen."""
        kept = {
            delivery.row_id
            for worker in self._state.workers
            if not worker.is_frozen
            for delivery in worker.in_flight.deliveries()
        }
        rows = self._choose_rows() - kept
        self._state.database.pass_time("lease_until", rows)
        self._state.records.excuse(rows, {worker.name for worker in self._state.workers if worker.is_frozen})
        return f"time: leases pass: {sorted(rows)}"

    def _freeze(self) -> str:
        """Stops a worker for some time, as on a paused machine."""
        worker = self._draw.choice(self._state.workers)
        worker.is_frozen = True
        return f"fault: freeze: {worker.name}"

    def _thaw(self) -> str:
        frozen = [worker for worker in self._state.workers if worker.is_frozen]
        for worker in frozen:
            worker.is_frozen = False
        return f"fault: thaw: {[worker.name for worker in frozen]}"

    def _set_clock_back(self) -> str:
        rows = self._choose_rows()
        self._state.database.set_clock_back(rows)
        self._state.records.excuse(rows, {worker.name for worker in self._state.workers})
        return f"fault: Postgres' clock is set back: {sorted(rows)}"

    def _retire(self) -> str:
        rows = self._choose_rows()
        self._state.database.pass_time("done_at", rows)
        return f"time: retention passes: {sorted(rows)}"

    def _tick(self) -> str:
        self._state.clock.now += self._draw.choice([2.1, 2.1, 2.1, 8.0])
        return f"time: the clock advances: {self._state.clock.now:.1f}"

    def _move_due(self) -> str:
        self._state.redis.move_due(self._draw)
        return "Redis: scheduled jobs are moved to their queues"
