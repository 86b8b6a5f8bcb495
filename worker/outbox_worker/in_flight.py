"""The rows that a worker holds, from the claim until their outcome is written."""

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Condition

from outbox.rq_jobs import Delivery
from outbox_worker.claim import Claim
from outbox_worker.outcome import Outcome, given_back

OVERTIME = 5.0
"""Seconds past its time limit after which an attempt is overdue: its handler is not expected to end."""
STUCK_AFTER = 1.0
"""Seconds that a row waits for a handler thread before all waiting rows are given back: another worker may have free
threads."""
_RECOUNT_INTERVAL = 0.05
"""Seconds between two counts of rows without an outcome, while the main thread waits for fewer."""


@dataclass(slots=True, eq=False)
class HeldRow:
    """A row that this worker holds. Each field is written by one thread at a time."""

    claim: Claim
    queued_at: float
    """When it was queued for the handler threads, by `InFlight.clock`."""
    begun_at: float | None = None
    """When its handler began. Written by its handler thread."""
    outcome: Outcome | None = None
    """The handler's outcome, written by the handler thread; or that of giving the row back, written by the main thread
    while no handler thread has the row."""
    given_up: Outcome | None = None
    """The outcome if the handler does not end before the worker. Written by the main thread."""
    collected: Outcome | None = None
    """The one of these two that the completer has collected. Written by the completer's thread."""


class InFlight:
    """Owns the rows that a worker holds, and the state of each.

    The main thread adds rows after a claim. A handler thread takes one and ends it. The completer's thread collects the
    outcomes and releases the rows whose outcome is written. One lock guards the rows, and is taken once per batch.
    Handler threads take no lock: each moves a row from one queue to another and writes to that row alone. If a handler
    thread lost the interpreter while it held a lock, all others would wait for it, and from then on at every row.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins without rows.

        Args:
            clock: returns the seconds by which the age of rows is measured.
        """
        self.clock = clock
        self._rows: dict[Delivery, HeldRow] = {}
        self._waiting: SimpleQueue[HeldRow] = SimpleQueue()
        self._ended: SimpleQueue[HeldRow | Outcome] = SimpleQueue()
        self._unanswered: dict[Delivery, Outcome] = {}
        """Unwritten outcomes of rows that are not held: their claim got no answer."""
        self._uncounted = 0
        """Number of these outcomes that are not collected: they are in `_ended` beside held rows."""
        self._collected = 0
        """Number of held rows whose outcome is collected and not written."""
        self._handled = 0
        """Number of rows that handlers have begun and whose outcomes have been collected so far."""
        self._given_up: list[HeldRow] = []
        """Rows that were given up, including those that are released: their handlers may still run."""
        self._changed = Condition()
        self._awaited = -1
        """The number of rows without an outcome that the main thread waits for; -1 if it does not wait."""

    # The main thread.

    def hold(self, claims: Iterable[Claim]) -> None:
        """Adds rows; their leases are renewed from now on, until they are released."""
        now = self.clock()
        with self._changed:
            for claim in claims:
                self._rows[claim.delivery] = HeldRow(claim, now)

    def queue(self, claims: Iterable[Claim]) -> None:
        """Queues held rows for the handler threads, in this order; a row that is named twice is queued once."""
        for delivery in dict.fromkeys(claim.delivery for claim in claims):
            self._waiting.put(self._rows[delivery])

    def give_back(self, claims: Iterable[Claim]) -> None:
        """Gives back held rows that are not queued: they become pending, and the attempt does not count."""
        for claim in claims:
            self.end(self._rows[claim.delivery], given_back(claim))

    def give_back_waiting(self) -> None:
        """Gives back all rows that no handler thread has begun."""
        try:
            while True:
                row = self._waiting.get_nowait()
                self.end(row, given_back(row.claim))
        except Empty:
            return

    def put(self, outcome: Outcome) -> None:
        """Offers the outcome of a row that is not held because its claim got no answer.

        The row cannot be claimed until the outcome is written: a copy of its job could begin it just before it is given
        back.
        """
        with self._changed:
            self._unanswered[outcome.delivery] = outcome
            self._uncounted += 1
        self._ended.put(outcome)

    def wait_until_unended(self, limit: int, timeout: float) -> int:
        """Waits up to `timeout` seconds until at most `limit` rows lack an outcome, and returns how many do."""
        deadline = time.monotonic() + timeout
        with self._changed:
            # The notification is not enough: while the completer writes, it collects nothing, and handlers end.
            while (count := self._count_unended()) > limit and (left := deadline - time.monotonic()) > 0:
                self._awaited = limit
                self._changed.wait(min(left, _RECOUNT_INTERVAL))
            self._awaited = -1
            return count

    def count_unended(self) -> int:
        """Returns how many rows lack an outcome."""
        with self._changed:
            return self._count_unended()

    def _count_unended(self) -> int:
        return max(0, len(self._rows) - self._collected - (self._ended.qsize() - self._uncounted))

    @property
    def handled(self) -> int:
        """How many rows handlers have ended so far, including those whose outcome is not collected."""
        with self._changed:
            return self._handled + max(0, self._ended.qsize() - self._uncounted)

    def is_stuck(self) -> bool:
        """Returns whether the row that waits longest for a handler thread has waited for more than `STUCK_AFTER`."""
        if self._waiting.empty():
            return False
        with self._changed:
            oldest = next((row for row in self._rows.values() if row.begun_at is None and row.outcome is None), None)
        return oldest is not None and self.clock() - oldest.queued_at > STUCK_AFTER

    def unended(self) -> list[Claim]:
        """Returns the rows that lack an outcome, in the order of their claims."""
        with self._changed:
            return [row.claim for row in self._rows.values() if row.outcome is None]

    def has_unended(self) -> bool:
        """Returns whether a row lacks an outcome, including rows that were given up and released."""
        with self._changed:
            return any(row.outcome is None for row in [*self._rows.values(), *self._given_up])

    def overdue(self) -> list[Claim]:
        """Returns the rows whose handlers have run for more than `OVERTIME` past their time limit."""
        now = self.clock()
        with self._changed:
            return [
                row.claim
                for row in self._rows.values()
                if row.begun_at is not None
                and row.outcome is None
                and now - row.begun_at > row.claim.timeout + OVERTIME
            ]

    def give_up(self, outcome_of: Callable[[Claim], Outcome]) -> list[Claim]:
        """Offers an outcome for every row that lacks one, and returns these rows.

        If a handler ends later, its own outcome replaces the offered one, unless that is written already.
        """
        with self._changed:
            rows = [row for row in self._rows.values() if row.collected is None]
        self._given_up = given_up = [row for row in rows if row.outcome is None]
        for row in given_up:
            row.given_up = outcome_of(row.claim)
        for row in rows:  # all of them: a thread may have died after it set the outcome and before it queued the row
            self._ended.put(row)
        return [row.claim for row in given_up]

    # The handler threads.

    def begin(self) -> HeldRow:
        """Waits for the next row in the queue, and returns it."""
        row = self._waiting.get()
        row.begun_at = self.clock()
        return row

    def end(self, row: HeldRow, outcome: Outcome) -> None:
        """Offers the outcome of a row to the completer."""
        row.outcome = outcome
        self._ended.put(row)

    # The completer's thread.

    def collect(self, timeout: float) -> list[Outcome]:
        """Waits up to `timeout` seconds for an outcome, and returns all that are there.

        If a handler ended after its row was given up, the row has two outcomes, and the handler's counts.
        """
        ended: list[HeldRow | Outcome] = []
        try:
            ended.append(self._ended.get(timeout=timeout) if timeout > 0 else self._ended.get_nowait())
            while True:
                ended.append(self._ended.get_nowait())
        except Empty:
            if not ended:
                return []
        outcomes: list[Outcome] = []
        with self._changed:
            for item in ended:
                if isinstance(item, Outcome):
                    self._uncounted -= 1
                    outcomes.append(item)
                elif outcome := self._collect(item):
                    outcomes.append(outcome)
            if self._count_unended() <= self._awaited:  # each wake-up costs the handlers the interpreter
                self._changed.notify()
        return outcomes

    def collect_again(self) -> list[Outcome]:
        """Returns all outcomes that are not written: an error may have interrupted their writing."""
        with self._changed:
            for row in self._rows.values():
                self._collect(row)
            collected = [row.collected for row in self._rows.values() if row.collected is not None]
            return [*self._unanswered.values(), *collected]

    def _collect(self, row: HeldRow) -> Outcome | None:
        outcome = row.outcome or row.given_up
        if outcome is None or outcome is row.collected:
            return None
        if row.collected is None:
            self._collected += 1
            self._handled += row.begun_at is not None
        row.collected = outcome
        return outcome

    @property
    def has_outcomes(self) -> bool:
        """Whether there are outcomes to collect."""
        return not self._ended.empty()

    def release(self, deliveries: Iterable[Delivery]) -> None:
        """Removes rows whose outcome is written, or that were taken from this worker."""
        with self._changed:
            for delivery in deliveries:
                row = self._rows.pop(delivery, None)
                if row is not None and row.collected is not None:
                    self._collected -= 1
                self._unanswered.pop(delivery, None)

    # The main thread and the completer's thread.

    def deliveries(self) -> Collection[Delivery]:
        """Returns all rows whose outcome is not written: their leases are renewed, and none of them is claimed."""
        with self._changed:
            return self._unanswered.keys() | self._rows.keys()
