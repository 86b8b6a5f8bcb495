"""The threads that run handlers, and how many rows are claimed ahead of them."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Condition, Thread

from outbox import logs
from outbox.jobs import Delivery
from outbox.outage import one_line
from worker.attempt import Attempted, Outcome, cut_short, given_back
from worker.claim import Claim
from worker.errors import NoThreadsError, ThreadEndedError

LOOKAHEAD = 0.2
"""Seconds of work that are claimed ahead, at the recent completion rate: no thread should be idle while the next claim
is under way. Where handlers take long, that is no row at all."""
MOST_AHEAD = 2000
"""Upper bound of rows claimed ahead."""
PATIENCE = 1.0
"""Seconds after which rows that no thread has begun are given back: handlers have become slow, and another worker may
have threads to spare."""
LONGEST_WAIT = 5.0
"""Seconds after which a row that was claimed is not begun any more. Less than a lease."""
OVERTIME = 5.0
"""Seconds past its time limit after which an attempt is overdue: its handler is not expected to end any more."""
BROKEN_DELAY = 15.0
"""Seconds until a row is tried again whose attempt failed in our own code."""
PUTTING_TIME = 1.0
"""Seconds that a handler's thread may take to put an outcome that it has."""


class Slots:
    """As many threads as there may be handlers at once, started as they are needed.

    The threads share no lock as they go from row to row: one that lost the interpreter while it held such a lock would
    make all others wait for it, and from then on they would wait for one another at every row.
    """

    def __init__(self, count: int, handle: Callable[[Claim], Attempted], put: Callable[[Outcome], None]) -> None:
        """Takes what runs a claimed row, and what then gets the outcome."""
        self._count = count
        self._handle = handle
        self._put = put
        self._threads: list[Thread] = []
        self._waiting: SimpleQueue[tuple[Claim, float]] = SimpleQueue()
        self._held: dict[Delivery, Claim] = {}
        """The rows whose outcome has not been put."""
        self._undecided: dict[Delivery, Claim] = {}
        """The same, but for those whose outcome is being put."""
        self._begun_at: dict[Delivery, float] = {}
        """When their handlers began, for those whose handlers have."""
        self._pace = _Pace(count)
        self._begun = 0
        self._changed = Condition()
        self._wake_at = -1
        """As many held rows as somebody waits for."""
        self._last_chances = False
        """Whether there was one among the last rows: then only as many are claimed as can begin."""
        self._moved_at = time.monotonic()
        """When a thread last began a row, or got new ones to begin."""
        self._is_late = False
        """Whether the row that was begun last had waited for longer than PATIENCE."""

    def wait_for_room(self, timeout: float) -> int:
        """Waits up to `timeout` seconds until a claim is worth while, and returns how many rows there is room for."""
        ahead = 0 if self._last_chances else self._pace.ahead(self._begun - len(self._held))
        self._await(self._count + ahead - max(1, ahead // 2), timeout)
        return max(0, self._count + ahead - len(self._held))

    def _await(self, held: int, timeout: float) -> None:
        with self._changed:
            self._wake_at = held
            self._changed.wait_for(lambda: len(self._held) <= held, timeout)
            self._wake_at = -1

    def begin(self, claims: Sequence[Claim]) -> list[Claim]:
        """Gives rows to the threads.

        Returns:
            Rows that it did not take, because no thread is free for them: they are at their last attempt, and would be
            dead without having begun if this worker were killed.

        Raises:
            NoThreadsError: there is no thread to run them, and none can be started.
        """
        now = time.monotonic()
        self._moved_at = now
        last_chances = [claimed for claimed in claims if claimed.attempt > claimed.max_retries]
        self._last_chances = bool(last_chances)
        not_taken = last_chances[max(0, self._count - len(self._held)) :]
        if last_chances:
            claims = [
                *(claimed for claimed in last_chances if claimed not in not_taken),
                *(claimed for claimed in claims if claimed not in last_chances),
            ]
        by_delivery = {claimed.delivery: claimed for claimed in claims}
        self._begun += len(by_delivery)
        self._held.update(by_delivery)
        self._undecided.update(by_delivery)
        for claimed in by_delivery.values():
            self._waiting.put((claimed, now))
        self._start_threads()
        return not_taken

    def _start_threads(self) -> None:
        wanted = min(self._count, len(self._held))
        if len(self._threads) >= wanted:
            return
        try:
            while len(self._threads) < wanted:
                thread = Thread(target=self._work, name=f"handler-{len(self._threads) + 1}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except (RuntimeError, MemoryError) as error:  # a limit of processes, or no memory for its stack
            if not self._threads:
                raise NoThreadsError(f"no thread can be started to run handlers: {one_line(error)}") from error
            logs.get().warning("handlers run in fewer threads", threads=len(self._threads), why=one_line(error))

    def check(self) -> None:
        """Checks that every thread lives: a row that one had in hand would stay `running` for ever.

        Raises:
            ThreadEndedError: one has ended.
        """
        if dead := [thread.name for thread in self._threads if not thread.is_alive()]:
            raise ThreadEndedError(f"handler threads ended ({', '.join(dead)}): start another worker")

    def _work(self) -> None:
        while True:
            claimed, since = self._waiting.get()
            self._moved_at = now = time.monotonic()
            self._is_late = now - since > PATIENCE
            self._begun_at[claimed.delivery] = now
            try:
                # One that has waited for so long may be another worker's by now: this process was paused, say.
                is_late = now - since > LONGEST_WAIT
                outcome, report = Attempted(given_back(claimed), None) if is_late else self._handle(claimed)
            except BaseException as error:  # noqa: BLE001 - out of memory, say: the thread goes on, the row is retried
                outcome, report = _broken(claimed, error)
            self._undecided.pop(claimed.delivery, None)
            self._put(outcome)
            self._begun_at.pop(claimed.delivery, None)
            self._held.pop(claimed.delivery, None)
            if len(self._held) <= self._wake_at:
                with self._changed:
                    if len(self._held) <= self._wake_at:
                        self._wake_at = -1  # or every thread would notify, until who waits has the interpreter
                        self._changed.notify()
            if report is not None:
                with suppress(BaseException):  # an error of logging must not end the thread
                    report()

    @property
    def are_stuck(self) -> bool:
        """Whether rows wait for a thread for longer than `PATIENCE`."""
        is_late = self._is_late or time.monotonic() - self._moved_at > PATIENCE
        return is_late and not self._waiting.empty()

    def overdue(self) -> list[Claim]:
        """Returns the rows whose handlers run for longer than their time limit and `OVERTIME`."""
        now = time.monotonic()
        begun = [(self._undecided.get(delivery), began) for delivery, began in list(self._begun_at.items())]
        return [claimed for claimed, began in begun if claimed and now - began > claimed.timeout + OVERTIME]

    def take_back(self) -> list[Claim]:
        """Returns the rows that no thread has begun, and forgets them."""
        back: list[Claim] = []
        self._is_late = False
        with suppress(Empty):
            while True:
                back.append(self._waiting.get_nowait()[0])
        for claimed in back:
            self._undecided.pop(claimed.delivery, None)
            self._held.pop(claimed.delivery, None)
        self._begun -= len(back)
        return back

    def wait_until_empty(self, timeout: float) -> None:
        """Waits up to `timeout` seconds until no handler runs."""
        self._await(0, timeout)

    @property
    def unfinished(self) -> list[Claim]:
        """The rows whose handlers have not ended."""
        return list(self._held.values())

    def give_up(self, outcome_of: Callable[[Claim], Outcome]) -> list[Claim]:
        """Puts an outcome for every row whose handler has not ended, and returns these rows.

        A handler that ends after all puts its own as well, later.
        """
        given_up: dict[Delivery, Claim] = {}
        for delivery in list(self._undecided):
            if claimed := self._undecided.pop(delivery, None):
                self._put(outcome_of(claimed))
                given_up[delivery] = claimed
        # The others' threads are about to put what became of them, unless they ended over that.
        limit = time.monotonic() + PUTTING_TIME
        while (left := self._held.keys() - given_up.keys()) and time.monotonic() < limit:
            time.sleep(0.001)
        for delivery in left:
            if claimed := self._held.pop(delivery, None):
                self._put(outcome_of(claimed))
                given_up[delivery] = claimed
        return list(given_up.values())


def _broken(claimed: Claim, error: BaseException) -> Attempted:
    outcome = cut_short(claimed, f"the attempt broke its thread: {type(error).__name__}", 0.0, BROKEN_DELAY)

    def report() -> None:
        logs.get().error(
            "attempt broke its thread", row=claimed.delivery.row, error=type(error).__name__, exc_info=error
        )

    return Attempted(outcome, report)


class _Pace:
    """How many rows are worth claiming ahead: as many as will be handled in the next `LOOKAHEAD` seconds."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._looked_at = time.monotonic()
        self._ended = 0
        self._ahead = 0

    def ahead(self, ended: int) -> int:
        """Returns the number.

        Args:
            ended: how many rows have been handled so far.
        """
        now = time.monotonic()
        elapsed = now - self._looked_at
        has_seen_all = ended - self._ended >= self._threads and elapsed > LOOKAHEAD / 10
        if has_seen_all or elapsed > LOOKAHEAD / 2:
            self._ahead = min(MOST_AHEAD, int((ended - self._ended) / elapsed * LOOKAHEAD))
            self._looked_at, self._ended = now, ended
        return self._ahead
