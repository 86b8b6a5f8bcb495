"""The threads that run handlers, and how many rows they have room for."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread

from outbox import logs
from outbox.outage import one_line
from outbox_worker.claim import Claim
from outbox_worker.errors import NoThreadsError, ThreadEndedError
from outbox_worker.in_flight import InFlight
from outbox_worker.lookahead import Lookahead
from outbox_worker.outcome import Attempted, cut_short, given_back

LONGEST_WAIT = 5.0
"""Seconds after which a row that was claimed is not begun any more. Less than a lease."""
BROKEN_DELAY = 15.0
"""Seconds until a row is tried again whose attempt failed in our own code."""


class HandlerThreads:
    """As many threads as there may be handlers at once, started as they are needed."""

    def __init__(self, count: int, in_flight: InFlight, execute: Callable[[Claim], Attempted]) -> None:
        """Takes the rows to handle, and what runs an attempt at one."""
        self._count = count
        self._in_flight = in_flight
        self._execute = execute
        self._threads: list[Thread] = []
        self._lookahead = Lookahead(count)
        self._last_chances = False
        """Whether there was a row at its last attempt among the last: then only as many are claimed as can begin."""

    def wait_for_room(self, timeout: float) -> int:
        """Waits up to `timeout` seconds until a claim is worth while, and returns how many rows there is room for."""
        ahead = 0 if self._last_chances else self._lookahead.rows(self._in_flight.handled)
        unended = self._in_flight.wait_until(self._count + ahead - max(1, ahead // 2), timeout)
        return max(0, self._count + ahead - unended)

    def begin(self, claims: Sequence[Claim]) -> None:
        """Holds claimed rows and has them handled, those at their last attempt first.

        Of these, only as many as there are free threads: one that is claimed ahead would be dead without having begun
        if this worker were killed. The others are given back.

        Raises:
            NoThreadsError: there is no thread to run them, and none can be started.
        """
        last_chances = [claim for claim in claims if claim.attempt > claim.max_retries]
        self._last_chances = bool(last_chances)
        if not last_chances:
            self._in_flight.hold(claims)
            self._in_flight.queue(claims)
        else:
            free = max(0, self._count - self._in_flight.wait_until(0, 0))
            self._in_flight.hold(claims)
            self._in_flight.queue(last_chances[:free])
            self._in_flight.queue(claim for claim in claims if claim not in last_chances)
            self._in_flight.give_back(last_chances[free:])
        self._start()

    def _start(self) -> None:
        wanted = min(self._count, self._in_flight.wait_until(self._count, 0))
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
            row = self._in_flight.begin()
            try:
                # One that has waited for so long may be another worker's by now: this process was paused, say.
                if time.monotonic() - row.queued_at > LONGEST_WAIT:
                    attempted = Attempted(given_back(row.claim), None)
                else:
                    attempted = self._execute(row.claim)
            except BaseException as error:  # noqa: BLE001 - out of memory, say: the thread goes on, the row is retried
                attempted = _broken(row.claim, error)
            self._in_flight.end(row, attempted.outcome)
            if attempted.report is not None:
                with suppress(BaseException):  # an error of logging must not end the thread
                    attempted.report()


def _broken(claim: Claim, error: BaseException) -> Attempted:
    outcome = cut_short(claim, f"the attempt broke its thread: {type(error).__name__}", 0.0, BROKEN_DELAY)

    def report() -> None:
        logs.get().error(
            "attempt broke its thread", row=claim.delivery.row_id, error=type(error).__name__, exc_info=error
        )

    return Attempted(outcome, report)
