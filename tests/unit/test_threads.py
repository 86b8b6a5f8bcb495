"""The rows in flight and the handler threads: how many rows are claimed ahead, and the outcome of each row."""

import time
from collections.abc import Callable, Iterator, Sequence
from threading import Event, Semaphore, Thread
from typing import NoReturn

import pytest

from outbox.row import Status
from outbox.rq_jobs import Delivery
from outbox_worker.claim import Claim
from outbox_worker.errors import NoThreadsError, ThreadEndedError
from outbox_worker.in_flight import OVERTIME, STUCK_AFTER, HeldRow, InFlight
from outbox_worker.lookahead import LOOKAHEAD, MAX_AHEAD
from outbox_worker.outcome import Attempted, Outcome, given_back, unanswered
from outbox_worker.threads import LONGEST_WAIT, HandlerThreads
from tests.support.manual_clock import ManualClock
from tests.support.waiting import eventually

COUNT = 4


class Crew:
    """Handler threads on a clock that stands still, and a completer that only collects outcomes and releases rows.

    The handlers wait until the test lets them end.
    """

    def __init__(self, handle: Callable[[Claim], Attempted] | None = None, count: int = COUNT) -> None:
        self.may_end = Event()
        self._ends = Semaphore(0)
        self.begun: list[int] = []
        """Ids of the rows whose handlers have begun."""
        self.outcomes: list[Outcome] = []
        self.clock = ManualClock()
        self.in_flight = InFlight(self.clock)
        self.threads = HandlerThreads(count, self.in_flight, handle or self._handle)
        self._is_closing = False
        self._completer = Thread(target=self._complete, daemon=True)
        self._completer.start()

    def _handle(self, claim: Claim) -> Attempted:
        self.begun.append(claim.delivery.row_id)
        ends = time.monotonic() + 10
        while not self.may_end.is_set() and not self._ends.acquire(timeout=0.01) and time.monotonic() < ends:
            pass
        return Attempted(Outcome(claim.delivery, Status.DONE, claim.attempt), lambda: None)

    def _complete(self) -> None:
        while not self._is_closing:
            outcomes = self.in_flight.collect(0.01)
            self.outcomes += outcomes
            self.in_flight.release(outcome.delivery for outcome in outcomes)

    def end(self, count: int) -> None:
        """Lets `count` handlers end."""
        self._ends.release(count)

    def begin(self, *row_ids: int, attempt: int = 1, timeout: int = 30) -> None:
        """Queues rows with 3 retries for the threads."""
        self.threads.begin([claim_of(row_id, attempt, timeout) for row_id in row_ids])

    def wait_until_empty(self) -> None:
        """Waits until every row has an outcome that the completer can see."""
        eventually(lambda: self.in_flight.count_unended() == 0, 5)

    def handle_many(self) -> None:
        """Handles so many rows in so short a time that as many rows are claimed ahead as may be."""
        self.may_end.set()
        self.begin(*range(1000, 1000 + MAX_AHEAD))
        self.wait_until_empty()
        self.clock.advance(LOOKAHEAD / 2)

    def close(self) -> None:
        """Lets all handlers end, and ends the completer."""
        self.may_end.set()
        self._is_closing = True
        self._completer.join(5)


def claim_of(row_id: int, attempt: int = 1, timeout: int = 30) -> Claim:
    """Returns a claim of a row with 3 retries."""
    return Claim(Delivery(row_id, 1), "t", "{}", "default", attempt, 3, timeout, None)


def row_ids_of(claims: Sequence[Claim]) -> list[int]:
    """Returns the claims' row ids in order."""
    return sorted(claim.delivery.row_id for claim in claims)


@pytest.fixture
def crew() -> Iterator[Crew]:
    """A crew, which is closed after the test."""
    crew = Crew()
    yield crew
    crew.close()


def done(claim: Claim) -> Attempted:
    """Handles a row at once."""
    return Attempted(Outcome(claim.delivery, Status.DONE, claim.attempt), lambda: None)


def test_a_fresh_worker_claims_nothing_ahead(crew: Crew) -> None:
    """It claims as many rows as it has threads, and one more when a thread is free."""
    assert crew.threads.wait_for_room(0) == COUNT
    crew.begin(1, 2, 3)
    assert crew.threads.wait_for_room(0) == 1
    crew.begin(4)
    assert crew.threads.wait_for_room(0.01) == 0
    crew.may_end.set()
    eventually(lambda: crew.threads.wait_for_room(0) == COUNT, 5)
    assert sorted(outcome.delivery.row_id for outcome in crew.outcomes) == [1, 2, 3, 4]


def test_rows_are_claimed_ahead_at_the_recent_completion_rate(crew: Crew) -> None:
    """As many as will be handled during the next lookahead; none once no row has ended for a while."""
    crew.may_end.set()
    crew.begin(*range(100))
    crew.wait_until_empty()
    crew.clock.advance(LOOKAHEAD / 2)
    assert crew.threads.wait_for_room(1) == pytest.approx(COUNT + 200, abs=1)
    crew.clock.advance(LOOKAHEAD)
    assert crew.threads.wait_for_room(1) == COUNT


def test_the_rows_claimed_ahead_are_limited(crew: Crew) -> None:
    """At any completion rate."""
    crew.handle_many()
    assert crew.threads.wait_for_room(1) == COUNT + MAX_AHEAD


def test_no_rows_are_claimed_ahead_while_some_are_at_their_last_attempt(crew: Crew) -> None:
    """If the worker were killed, a row that waits for its last attempt would be dead without it."""
    crew.handle_many()
    assert crew.threads.wait_for_room(1) > COUNT
    crew.begin(1, attempt=4)
    crew.wait_until_empty()
    assert crew.threads.wait_for_room(1) == COUNT
    crew.begin(2, attempt=3)
    crew.wait_until_empty()
    assert crew.threads.wait_for_room(1) > COUNT


def test_a_last_attempt_without_a_free_thread_is_given_back(crew: Crew) -> None:
    """It is given back at once, with any other rows in its claim; with a free thread, it begins first."""
    crew.begin(1, 2, 3)
    crew.threads.begin([claim_of(4), claim_of(5, attempt=4), claim_of(6, attempt=4)])
    eventually(lambda: crew.outcomes == [given_back(claim_of(6, attempt=4))], 5)
    eventually(lambda: sorted(crew.begun) == [1, 2, 3, 5], 5)
    crew.in_flight.give_back_waiting()
    eventually(lambda: crew.outcomes[1:] == [given_back(claim_of(4))], 5)


def test_rows_that_wait_long_are_stuck_although_threads_begin_others(crew: Crew) -> None:
    """Handlers have become slow and end one after the other: the rows behind them still wait."""
    crew.begin(*range(1, 11))
    eventually(lambda: len(crew.begun) == COUNT, 5)
    crew.clock.advance(STUCK_AFTER + 0.1)
    crew.end(1)
    eventually(lambda: len(crew.begun) == COUNT + 1, 5)
    assert crew.in_flight.is_stuck()
    crew.in_flight.give_back_waiting()
    assert not crew.in_flight.is_stuck()
    eventually(lambda: len(crew.outcomes) == 10 - COUNT, 5)


def test_a_row_that_waited_too_long_is_not_begun(crew: Crew) -> None:
    """The process was paused, and another worker may hold the row: it is given back, and the attempt does not count."""
    crew.begin(*range(1, COUNT + 2))
    eventually(lambda: len(crew.begun) == COUNT, 5)
    crew.clock.advance(LONGEST_WAIT + 0.1)
    crew.end(1)
    eventually(lambda: Outcome(Delivery(COUNT + 1, 1), Status.PENDING, 0) in crew.outcomes, 5)
    assert COUNT + 1 not in crew.begun


def test_rows_that_no_thread_begins_are_given_back(crew: Crew) -> None:
    """Handlers have become slow: rows that wait for a thread are given back, rows that run are kept."""
    crew.begin(*range(1, 11))
    eventually(lambda: len(crew.begun) == COUNT, 5)
    crew.clock.advance(STUCK_AFTER)
    assert not crew.in_flight.is_stuck()
    crew.clock.advance(0.1)
    assert crew.in_flight.is_stuck()
    crew.in_flight.give_back_waiting()
    assert not crew.in_flight.is_stuck()
    assert row_ids_of(crew.in_flight.unended()) == [1, 2, 3, 4]
    eventually(lambda: crew.outcomes == [given_back(claim_of(row_id)) for row_id in range(5, 11)], 5)


def test_rows_that_come_after_a_quiet_time_are_not_stuck(crew: Crew) -> None:
    """Their own wait counts, not the time in which no row began."""
    crew.clock.advance(STUCK_AFTER + 0.1)
    crew.begin(*range(1, 11))
    assert not crew.in_flight.is_stuck()


@pytest.mark.parametrize("ends", [True, False])
def test_a_row_that_does_not_end_is_given_up(crew: Crew, ends: bool) -> None:  # noqa: FBT001
    """Every row gets one outcome: that of its handler, or that of giving up."""
    crew.begin(1, 2)
    eventually(lambda: len(crew.begun) == 2, 5)
    if ends:
        crew.may_end.set()
        crew.wait_until_empty()
    given_up = crew.in_flight.give_up(lambda claim: Outcome(claim.delivery, Status.PENDING, 0))
    assert len(given_up) == (0 if ends else 2)
    eventually(lambda: [outcome.status for outcome in crew.outcomes] == ["done" if ends else "pending"] * 2, 5)


def test_a_handler_that_ends_after_its_row_was_given_up_offers_its_outcome(crew: Crew) -> None:
    """Its mail is sent: unless the first outcome is written already, the row is done."""
    crew.begin(1, 2)
    eventually(lambda: len(crew.begun) == 2, 5)
    crew.in_flight.give_up(lambda claim: Outcome(claim.delivery, Status.PENDING, 0))
    crew.may_end.set()
    eventually(lambda: [outcome.status for outcome in crew.outcomes] == ["pending"] * 2 + ["done"] * 2, 5)
    assert not crew.in_flight.unended()


def test_of_two_outcomes_of_a_row_the_handlers_counts() -> None:
    """The handler ends after its row was given up and before the write: only its outcome is collected."""
    in_flight = InFlight()
    in_flight.hold([claim_of(1)])
    in_flight.queue([claim_of(1)])
    row = in_flight.begin()
    in_flight.give_up(lambda claim: Outcome(claim.delivery, Status.PENDING, 0))
    in_flight.end(row, Outcome(Delivery(1, 1), Status.DONE, 1))
    assert in_flight.collect(1) == [Outcome(Delivery(1, 1), Status.DONE, 1)]
    assert in_flight.collect(0) == []


def test_the_handler_of_a_row_that_was_given_up_has_not_ended(crew: Crew) -> None:
    """Also once the row is released: the process must exit without it."""
    crew.begin(1)
    eventually(lambda: crew.begun, 5)
    crew.in_flight.give_up(lambda claim: Outcome(claim.delivery, Status.PENDING, 0))
    eventually(lambda: not crew.in_flight.deliveries(), 5)
    assert crew.in_flight.has_unended()
    crew.may_end.set()
    eventually(lambda: not crew.in_flight.has_unended(), 5)


def test_a_row_is_held_until_its_outcome_is_written() -> None:
    """Its lease is renewed until then; there is room for another row as soon as its handler has ended."""
    in_flight = InFlight()
    in_flight.hold([claim_of(1), claim_of(2)])
    in_flight.queue([claim_of(1), claim_of(2)])
    in_flight.end(in_flight.begin(), Outcome(Delivery(1, 1), Status.DONE, 1))
    in_flight.collect(1)
    assert in_flight.count_unended() == 1
    assert in_flight.deliveries() == {Delivery(1, 1), Delivery(2, 1)}
    in_flight.release([Delivery(1, 1)])
    assert in_flight.count_unended() == 1
    assert in_flight.deliveries() == {Delivery(2, 1)}
    assert in_flight.handled == 1


def test_the_outcome_of_a_row_that_is_not_held_makes_no_room() -> None:
    """It waits to be collected while a handler runs: the handler's row still counts as unended."""
    in_flight = InFlight()
    in_flight.hold([claim_of(1)])
    in_flight.queue([claim_of(1)])
    row = in_flight.begin()
    in_flight.put(unanswered(Delivery(2, 1)))
    assert in_flight.count_unended() == 1
    in_flight.collect(0)
    assert in_flight.count_unended() == 1
    in_flight.end(row, Outcome(Delivery(1, 1), Status.DONE, 1))
    assert in_flight.count_unended() == 0


def test_a_row_that_is_being_given_back_cannot_be_claimed() -> None:
    """Redis may hold its job twice: the row would be given back while its handler runs."""
    in_flight = InFlight()
    in_flight.put(unanswered(Delivery(1, 1)))
    assert in_flight.deliveries() == {Delivery(1, 1)}
    in_flight.collect(0)
    assert in_flight.deliveries() == {Delivery(1, 1)}
    in_flight.release([Delivery(1, 1)])
    assert not in_flight.deliveries()


@pytest.mark.parametrize("error", [MemoryError(), SystemExit(1), ValueError("a fault of ours")])
def test_a_thread_survives_any_error_of_an_attempt(error: BaseException) -> None:
    """The row is tried again, the attempt counts, and the same thread handles the next row."""

    def handle(claim: Claim) -> Attempted:
        if claim.delivery.row_id == 1:
            raise error
        return done(claim)

    crew = Crew(handle, count=1)
    crew.begin(1)
    crew.begin(2)
    eventually(lambda: len(crew.outcomes) == 2, 5)
    broken, good = crew.outcomes
    assert (broken.status, broken.attempts, good.status) == ("pending", 1, "done")
    assert type(error).__name__ in str(broken.error)
    crew.threads.check()
    crew.close()


def test_the_outcome_is_offered_before_the_attempt_is_logged() -> None:
    """A log that blocks or raises delays no outcome and ends no thread."""
    may_go_on = Event()

    def report() -> None:
        may_go_on.wait(10)
        raise ZeroDivisionError

    crew = Crew(lambda claim: Attempted(Outcome(claim.delivery, Status.DONE, 1), report), count=1)
    crew.begin(1)
    eventually(lambda: crew.outcomes, 5, "the outcome is offered while its log line is written")
    eventually(lambda: not crew.in_flight.deliveries(), 5, "the row is released")
    crew.begin(2)
    may_go_on.set()
    eventually(lambda: len(crew.outcomes) == 2, 5, "the thread goes on")
    crew.threads.check()
    crew.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("has_outcome", [True, False])
def test_a_thread_that_ended_is_detected_and_its_row_gets_an_outcome(
    has_outcome: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the worker ends, the thread's row has an outcome: its own if it had one, else that of giving up."""
    crew = Crew(done, count=1)

    def end(row: HeldRow, outcome: Outcome) -> NoReturn:
        row.outcome = outcome if has_outcome else None
        raise SystemExit

    monkeypatch.setattr(crew.in_flight, "end", end)
    crew.begin(1)
    eventually(lambda: not crew.threads._threads[0].is_alive(), 5)
    with pytest.raises(ThreadEndedError, match="handler-1"):
        crew.threads.check()
    given_up = crew.in_flight.give_up(lambda claim: Outcome(claim.delivery, Status.PENDING, 1))
    assert given_up == ([] if has_outcome else [claim_of(1)])
    eventually(lambda: [outcome.status for outcome in crew.outcomes] == ["done" if has_outcome else "pending"], 5)
    crew.close()


def test_a_worker_without_any_thread_ends_and_with_some_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses further threads. Rows of a worker without any thread are given back."""

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    without, crew = Crew(done, count=2), Crew()
    crew.begin(1)
    with monkeypatch.context() as patched:
        patched.setattr("threading.Thread.start", refuse)
        with pytest.raises(NoThreadsError, match="can't start new thread"):
            without.begin(1)
        without.in_flight.give_back_waiting()
        eventually(lambda: without.outcomes == [given_back(claim_of(1))], 5)
        crew.begin(2)
    crew.may_end.set()
    eventually(lambda: len(crew.outcomes) == 2, 5, "the one thread does both")
    without.close()
    crew.close()


def test_a_row_that_is_claimed_twice_is_begun_once(crew: Crew) -> None:
    """Two attempts at one row at the same time would send two mails."""
    crew.threads.begin([claim_of(1), claim_of(1)])
    eventually(lambda: crew.begun, 5)
    crew.may_end.set()
    crew.wait_until_empty()
    crew.begin(2)
    eventually(lambda: 2 in crew.begun, 5)
    assert crew.begun == [1, 2]


def test_an_attempt_is_overdue_past_its_limit_and_a_grace(crew: Crew) -> None:
    """The time counts from the begin of its handler, not from its wait for a thread."""
    crew.begin(1, timeout=1)
    crew.begin(2, 3, 4)
    crew.begin(5, timeout=1)
    eventually(lambda: len(crew.begun) == COUNT, 5)
    crew.clock.advance(1 + OVERTIME)
    assert crew.in_flight.overdue() == []
    crew.clock.advance(0.1)
    assert row_ids_of(crew.in_flight.overdue()) == [1]
    crew.may_end.set()
    eventually(lambda: not crew.in_flight.overdue(), 5)
