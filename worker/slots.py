"""The threads that run handlers, and how many rows are claimed ahead of them."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Condition, Thread

from outbox.jobs import Delivery
from worker.attempt import Outcome, given_back
from worker.claim import Claim
from worker.leases import OVERTIME

LOOKAHEAD = 0.2
"""Seconds of work that are claimed ahead, at the pace of late: no thread should be idle while the next claim is under
way. Where handlers take long, that is no row at all."""
MOST_AHEAD = 2000
"""Rows that are claimed ahead at the most."""
PATIENCE = 1.0
"""Seconds after which rows that no thread has begun are given back: handlers have become slow, and another worker may
have threads to spare."""


class Slots:
    """As many threads as there may be handlers at once, started as they are needed.

    The threads share no lock as they go from row to row: one that lost the interpreter while it held such a lock would
    make all others wait for it, and from then on they would wait for one another at every row.
    """

    def __init__(self, count: int, handle: Callable[[Claim], Outcome], put: Callable[[Outcome], None]) -> None:
        """Takes what runs a claimed row, and what then gets the outcome; neither may raise."""
        self._count = count
        self._handle = handle
        self._put = put
        self._threads = 0
        self._waiting: SimpleQueue[tuple[Claim, float]] = SimpleQueue()
        self._held: dict[Delivery, Claim] = {}
        """The rows whose outcome has not been put."""
        self._undecided: dict[Delivery, Claim] = {}
        """The same, but for those whose outcome is being put."""
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
        while self._threads < min(self._count, len(self._held)):
            self._threads += 1
            Thread(target=self._work, name=f"handler-{self._threads}", daemon=True).start()
        for claimed in claims:
            self._waiting.put((claimed, now))
        return not_taken

    def _work(self) -> None:
        while True:
            claimed, since = self._waiting.get()
            self._moved_at = now = time.monotonic()
            self._is_late = now - since > PATIENCE
            # The lease of one that has waited long may end before its handler would.
            outcome = self._handle(claimed) if now - since < OVERTIME else given_back(claimed)
            self._undecided.pop(claimed.delivery, None)
            self._put(outcome)
            self._held.pop(claimed.delivery, None)
            if len(self._held) <= self._wake_at:
                with self._changed:
                    if len(self._held) <= self._wake_at:
                        self._wake_at = -1  # or every thread would notify, until who waits has the interpreter
                        self._changed.notify()

    @property
    def are_stuck(self) -> bool:
        """Whether rows wait for a thread for longer than `PATIENCE`."""
        is_late = self._is_late or time.monotonic() - self._moved_at > PATIENCE
        return is_late and not self._waiting.empty()

    def take_back(self) -> list[Claim]:
        """Returns the rows that no thread has begun, and forgets them."""
        back: list[Claim] = []
        self._is_late = False
        with suppress(Empty):
            while True:
                back.append(self._waiting.get_nowait()[0])
        for claimed in back:
            del self._undecided[claimed.delivery]
            del self._held[claimed.delivery]
        self._begun -= len(back)
        return back

    def wait_until_empty(self, timeout: float) -> None:
        """Waits up to `timeout` seconds until no handler runs."""
        self._await(0, timeout)

    @property
    def undecided(self) -> list[Delivery]:
        """The rows whose handlers have not ended, or not begun."""
        return list(self._undecided)

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
        while self._held.keys() - given_up.keys():  # their threads are about to put what became of them
            time.sleep(0.001)
        return list(given_up.values())


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
