"""What happens to a schedule from outside: time passes, Redis does what it likes, clocks jump, a dump is restored."""

from collections.abc import Callable

from tests.schedules.setting import MOST_ROWS, Setting

_ROUND = 8.0
"""Seconds of the schedule's clock per round of the fair phase; a gap of more than 11 pauses a rescue."""


class Faults:
    """One schedule's. Its draws decide which faults there are at all."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._draw = draw = setting.draw
        self.connection_rate = draw.choice([0.0, 0.0, 0.03, 0.06, 0.12])
        """Of steps whose connection is lost, or whose process is killed."""
        self.time_out_rate = draw.choice([0.0, 0.02, 0.1])
        """Of steps, while anybody waits for a lock, at which that wait ends."""
        self._redis_rate = draw.choice([0.0, 0.1, 0.3, 0.6])
        self._freezes = draw.random() < 0.5
        self._sets_clock_back = draw.random() < 0.1
        self.restores = draw.random() < 0.2

    def happen(self, end_turns: Callable[[], None]) -> str:
        """Lets something happen, and returns what.

        Args:
            end_turns: ends all transactions, which a restore of the table waits for.
        """
        draw = self._draw
        if self.restores and draw.random() < 0.4:
            if draw.random() < 0.1:
                return self._dump()
            if self._held():
                end_turns()
                return self._restore()
        if draw.random() < self._redis_rate:
            return f"Redis: {self._setting.bag.harm(draw)}"
        happenings: list[Callable[[], str]] = [self._come_due, self._come_due, self._age, *[self._expire] * 4]
        happenings += [self._tick, self._move_due, self._move_due, self._retire]
        if self._freezes:
            happenings += [self._freeze, self._freeze, self._thaw]
        if self._sets_clock_back:
            happenings.append(self._set_clock_back)
        return draw.choice(happenings)()

    def begin(self) -> None:
        """Makes the first dump, if this is a schedule with a restore."""
        if self.restores:
            self._dump()

    def _dump(self) -> str:
        self._setting.stage.dump()
        return "dump"

    def _restore(self) -> str:
        self._setting.stage.restore()
        self._setting.books.restored()
        self.restores = self._draw.random() < 0.5
        for worker in self._setting.workers:
            worker.is_frozen |= bool(worker.in_flight.deliveries()) and self._draw.random() < 0.5
        return "restore"

    def pass_all(self) -> None:
        """Lets all the time pass that any row waits for, but for leases that their workers renew."""
        every = set(range(1, MOST_ROWS * 3))
        for delivery, run_at in self._setting.stage.pass_time("run_at", every - self._setting.leaving_rows()):
            self._setting.bag.reschedule(delivery, run_at)
        self._setting.stage.pass_time("enqueued_at", every)
        self._setting.stage.pass_time("lease_until", every - self._held())
        self._setting.bag.move_due(None)
        self._setting.clock.now += _ROUND

    def _rows(self) -> set[int]:
        return {row for row in range(1, MOST_ROWS + 3) if self._draw.random() < 0.8}

    def _held(self) -> set[int]:
        return {delivery.row_id for worker in self._setting.workers for delivery in worker.in_flight.deliveries()}

    def _come_due(self) -> str:
        rows = self._rows() - self._setting.leaving_rows()
        for delivery, run_at in self._setting.stage.pass_time("run_at", rows):
            self._setting.bag.reschedule(delivery, run_at)
        return f"time: rows come due: {sorted(rows)}"

    def _age(self) -> str:
        rows = self._rows()
        self._setting.stage.pass_time("enqueued_at", rows)
        return f"time: the sweep's grace passes: {sorted(rows)}"

    def _expire(self) -> str:
        """Lets leases pass that nobody renews, or whose workers cannot because they are frozen."""
        kept = {
            delivery.row_id
            for worker in self._setting.workers
            if not worker.is_frozen
            for delivery in worker.in_flight.deliveries()
        }
        rows = self._rows() - kept
        self._setting.stage.pass_time("lease_until", rows)
        self._setting.books.excuse(rows, {worker.name for worker in self._setting.workers if worker.is_frozen})
        return f"time: leases pass: {sorted(rows)}"

    def _freeze(self) -> str:
        """Stops a worker for a while, as a paused machine does."""
        worker = self._draw.choice(self._setting.workers)
        worker.is_frozen = True
        return f"fault: freeze: {worker.name}"

    def _thaw(self) -> str:
        frozen = [worker for worker in self._setting.workers if worker.is_frozen]
        for worker in frozen:
            worker.is_frozen = False
        return f"fault: thaw: {[worker.name for worker in frozen]}"

    def _set_clock_back(self) -> str:
        rows = self._rows()
        self._setting.stage.set_clock_back(rows)
        self._setting.books.excuse(rows, {worker.name for worker in self._setting.workers})
        return f"fault: Postgres' clock is set back: {sorted(rows)}"

    def _retire(self) -> str:
        rows = self._rows()
        self._setting.stage.pass_time("done_at", rows)
        return f"time: retention passes: {sorted(rows)}"

    def _tick(self) -> str:
        self._setting.clock.now += self._draw.choice([2.1, 2.1, 2.1, 8.0])
        return f"time: the clock goes on: {self._setting.clock.now:.1f}"

    def _move_due(self) -> str:
        self._setting.bag.move_due(self._draw)
        return "Redis: scheduled jobs are moved to their queues"
