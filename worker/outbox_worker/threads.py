"""Runs handlers in threads, and measures how many rows there is room for."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread

from outbox.runtime import logs
from outbox.runtime.redaction import one_line
from outbox_worker.claim import Claim
from outbox_worker.errors import NoThreadsError, ThreadEndedError
from outbox_worker.in_flight import InFlight
from outbox_worker.lookahead import Lookahead
from outbox_worker.outcome import Attempted, cut_short, given_back

LONGEST_WAIT = 5.0
"""Seconds in the queue after which a row is given back instead of begun. Shorter than a lease."""
BROKEN_DELAY = 15.0
"""Seconds until the next attempt at a row if this one failed in the worker's own code."""


class HandlerThreads:
    """The handler threads of a worker, started as needed."""

    def __init__(self, count: int, in_flight: InFlight, execute: Callable[[Claim], Attempted]) -> None:
        """Starts no thread yet.

        Args:
            count: upper bound of threads.
            in_flight: the rows that they handle; its clock measures the completion rate too.
            execute: runs one attempt.
        """
        self._count = count
        self._in_flight = in_flight
        self._execute = execute
        self._threads: list[Thread] = []
        self._lookahead = Lookahead(count, in_flight.clock)
        self._has_last_attempts = False
        """Whether the last claim had a row at its last attempt: then no rows are claimed ahead."""

    def wait_for_room(self, timeout: float) -> int:
        """Waits up to `timeout` seconds until a claim is worthwhile, and returns how many rows there is room for."""
        ahead = 0 if self._has_last_attempts else self._lookahead.rows_ahead(self._in_flight.handled)
        unended = self._in_flight.wait_until_unended(self._count + ahead - max(1, ahead // 2), timeout)
        return max(0, self._count + ahead - unended)

    def begin(self, claims: Sequence[Claim]) -> None:
        """Holds claimed rows and queues them for the threads, those at their last attempt first.

        Gives back the rows at their last attempt for which no thread is free: if this worker were killed, a row that
        waits would be dead although its last attempt never began.

        Raises:
            NoThreadsError: no thread is running and none can be started.
        """
        last_attempts = [claim for claim in claims if claim.attempt > claim.max_retries]
        self._has_last_attempts = bool(last_attempts)
        if not last_attempts:
            self._in_flight.hold(claims)
            self._in_flight.queue(claims)
        else:
            free = max(0, self._count - self._in_flight.count_unended())
            self._in_flight.hold(claims)
            self._in_flight.queue(last_attempts[:free])
            self._in_flight.queue(claim for claim in claims if claim not in last_attempts)
            self._in_flight.give_back(last_attempts[free:])
        self._start()

    def _start(self) -> None:
        needed = min(self._count, self._in_flight.count_unended())
        if len(self._threads) >= needed:
            return
        try:
            while len(self._threads) < needed:
                thread = Thread(target=self._work, name=f"handler-{len(self._threads) + 1}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except (RuntimeError, MemoryError) as error:  # a limit of processes, or no memory for its stack
            if not self._threads:
                raise NoThreadsError(f"no thread can be started to run handlers: {one_line(error)}") from error
            logs.get().warning("handlers run in fewer threads", threads=len(self._threads), why=one_line(error))

    def check(self) -> None:
        """Checks that no thread has ended: the row of an ended thread would stay `running`.

        Raises:
            ThreadEndedError: a thread has ended.
        """
        if dead := [thread.name for thread in self._threads if not thread.is_alive()]:
            raise ThreadEndedError(f"handler threads ended ({', '.join(dead)}): start another worker")

    def _work(self) -> None:
        while True:
            row = self._in_flight.begin()
            try:
                # After so long a wait another worker may hold the row: this process may have been paused.
                if self._in_flight.clock() - row.queued_at > LONGEST_WAIT:
                    attempted = Attempted(given_back(row.claim), None)
                else:
                    attempted = self._execute(row.claim)
            except BaseException as error:  # noqa: BLE001 - out of memory for example: the row is retried
                attempted = _broken(row.claim, error)
            self._in_flight.end(row, attempted.outcome)
            if attempted.report is not None:
                with suppress(BaseException):  # an error in logging must not end the thread
                    attempted.report()


def _broken(claim: Claim, error: BaseException) -> Attempted:
    outcome = cut_short(claim, f"the attempt broke its thread: {type(error).__name__}", 0.0, BROKEN_DELAY)

    def report() -> None:
        logs.get().error(
            "attempt broke its thread", row=claim.delivery.row_id, error=type(error).__name__, exc_info=error
        )

    return Attempted(outcome, report)
