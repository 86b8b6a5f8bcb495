"""The rows in flight and the threads that handle them: how much is claimed ahead, and what becomes of each row."""

import time
from collections.abc import Callable, Iterator, Sequence
from threading import Event, Semaphore, Thread
from typing import NoReturn

import pytest

from outbox.row import Status
from outbox.rq_jobs import Delivery
from outbox_worker.claim import Claim
from outbox_worker.errors import NoThreadsError, ThreadEndedError
from outbox_worker.in_flight import PATIENCE, HeldRow, InFlight
from outbox_worker.lookahead import MAX_AHEAD
from outbox_worker.outcome import Attempted, Outcome, given_back, unanswered
from outbox_worker.threads import HandlerThreads
from tests.support.waiting import eventually

COUNT = 4


class Crew:
    """Threads whose handlers end when they are let, and all outcomes, which are written at once."""

    def __init__(self, handle: Callable[[Claim], Attempted] | None = None, count: int = COUNT) -> None:
        self.may_end = Event()
        self._ends = Semaphore(0)
        self.begun: list[int] = []
        self.outcomes: list[Outcome] = []
        self.in_flight = InFlight()
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
        """Lets so many handlers end."""
        self._ends.release(count)

    def begin(self, *rows: int, attempt: int = 1, timeout: int = 30) -> None:
        """Gives rows to the threads, which have 3 retries."""
        self.threads.begin([claim_of(row, attempt, timeout) for row in rows])

    def wait_until_empty(self) -> None:
        """Waits until no handler runs."""
        eventually(lambda: not self.in_flight.unended(), 5)

    def close(self) -> None:
        """Lets all handlers end."""
        self.may_end.set()
        self._is_closing = True
        self._completer.join(5)


def claim_of(row: int, attempt: int = 1, timeout: int = 30) -> Claim:
    """Returns a claim of a row with 3 retries."""
    return Claim(Delivery(row, 1), "t", "{}", "default", attempt, 3, timeout, None)


def rows_of(claims: Sequence[Claim]) -> list[int]:
    """Returns the claims' rows in order."""
    return sorted(claim.delivery.row_id for claim in claims)


@pytest.fixture
def crew() -> Iterator[Crew]:
    """A crew, which is let go in the end."""
    made = Crew()
    yield made
    made.close()


def done(claim: Claim) -> Attempted:
    """Handles a row at once."""
    return Attempted(Outcome(claim.delivery, Status.DONE, claim.attempt), lambda: None)


def test_without_a_pace_nothing_is_claimed_ahead(crew: Crew) -> None:
    """A fresh worker claims as many rows as it has threads, and one more when a thread is free."""
    assert crew.threads.wait_for_room(0) == COUNT
    crew.begin(1, 2, 3)
    assert crew.threads.wait_for_room(0) == 1
    crew.begin(4)
    assert crew.threads.wait_for_room(0.01) == 0
    crew.may_end.set()
    eventually(lambda: crew.threads.wait_for_room(0) == COUNT, 5)
    assert sorted(outcome.delivery.row_id for outcome in crew.outcomes) == [1, 2, 3, 4]


def test_short_handlers_have_rows_claimed_ahead(crew: Crew) -> None:
    """Of many that end at once, more rows are claimed than there are threads, up to a limit; later, none any more."""
    crew.may_end.set()
    begun = time.monotonic()
    row = 0
    while time.monotonic() - begun < 0.5:
        room = crew.threads.wait_for_room(1)
        crew.begin(*range(row, row + room))
        row += room
    assert COUNT < crew.threads.wait_for_room(1) <= COUNT + MAX_AHEAD
    crew.wait_until_empty()
    time.sleep(0.2)
    crew.threads.wait_for_room(1)
    time.sleep(0.2)
    assert crew.threads.wait_for_room(1) == COUNT


def test_rows_at_their_last_attempt_are_not_claimed_ahead(crew: Crew) -> None:
    """Were the worker killed, they would be dead without having begun."""
    crew.may_end.set()
    begun = time.monotonic()
    row = 10
    while time.monotonic() - begun < 0.3:
        room = crew.threads.wait_for_room(1)
        crew.begin(*range(row, row + room))
        row += room
    crew.wait_until_empty()
    assert crew.threads.wait_for_room(1) > COUNT
    crew.begin(1, attempt=4)
    crew.wait_until_empty()
    eventually(lambda: crew.threads.wait_for_room(1) == COUNT, 5)
    crew.begin(2, attempt=3)
    crew.wait_until_empty()
    eventually(lambda: crew.threads.wait_for_room(1) > COUNT, 5)


def test_a_last_attempt_that_could_not_begin_is_given_back(crew: Crew) -> None:
    """At once, whatever else has been claimed with it; where a thread is free, it comes first."""
    crew.begin(1, 2, 3)
    crew.threads.begin([claim_of(4), claim_of(5, attempt=4), claim_of(6, attempt=4)])
    eventually(lambda: crew.outcomes == [given_back(claim_of(6, attempt=4))], 5)
    eventually(lambda: sorted(crew.begun) == [1, 2, 3, 5], 5)
    crew.in_flight.give_back_waiting()
    eventually(lambda: crew.outcomes[1:] == [given_back(claim_of(4))], 5)


def test_rows_that_wait_long_are_stuck_although_threads_begin_others(crew: Crew) -> None:
    """Handlers have become slow, and end one after the other: the rows behind them wait all the same."""
    crew.begin(*range(1, 11))
    eventually(lambda: len(crew.begun) == COUNT, 5)
    time.sleep(PATIENCE + 0.1)
    crew.end(1)
    eventually(lambda: len(crew.begun) == COUNT + 1, 5)
    assert crew.in_flight.is_stuck()
    crew.in_flight.give_back_waiting()
    assert not crew.in_flight.is_stuck()
    eventually(lambda: len(crew.outcomes) == 10 - COUNT, 5)


def test_a_row_that_waited_too_long_is_not_begun(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process was paused, and the row is another worker's by now: it is given back, and no attempt counts."""
    crew.begin(*range(1, COUNT + 2))
    eventually(lambda: len(crew.begun) == COUNT, 5)
    monkeypatch.setattr("outbox_worker.threads.LONGEST_WAIT", 0.1)
    time.sleep(0.2)
    crew.end(1)
    eventually(lambda: Outcome(Delivery(COUNT + 1, 1), Status.PENDING, 0) in crew.outcomes, 5)
    assert COUNT + 1 not in crew.begun


def test_rows_that_no_thread_begins_are_given_back(crew: Crew) -> None:
    """Handlers have become slow: what waits for a thread goes to another worker, what runs stays."""
    crew.begin(*range(1, 11))
    eventually(lambda: len(crew.begun) == COUNT, 5)
    assert not crew.in_flight.is_stuck()
    eventually(crew.in_flight.is_stuck, PATIENCE + 2)
    crew.in_flight.give_back_waiting()
    assert not crew.in_flight.is_stuck()
    assert rows_of(crew.in_flight.unended()) == [1, 2, 3, 4]
    eventually(lambda: crew.outcomes == [given_back(claim_of(row)) for row in range(5, 11)], 5)


def test_rows_that_come_after_a_quiet_time_are_not_stuck(crew: Crew) -> None:
    """However long no row began: these have only just come."""
    time.sleep(PATIENCE + 0.1)
    crew.begin(*range(1, 11))
    assert not crew.in_flight.is_stuck()


@pytest.mark.parametrize("ends", [True, False])
def test_what_does_not_end_is_given_up(crew: Crew, ends: bool) -> None:  # noqa: FBT001
    """In the end every row has one outcome: its handler's, or that of giving up."""
    crew.begin(1, 2)
    eventually(lambda: len(crew.begun) == 2, 5)
    if ends:
        crew.may_end.set()
        crew.wait_until_empty()
    given_up = crew.in_flight.give_up(lambda claim: Outcome(claim.delivery, Status.PENDING, 0))
    assert len(given_up) == (0 if ends else 2)
    eventually(lambda: [outcome.status for outcome in crew.outcomes] == ["done" if ends else "pending"] * 2, 5)


def test_a_handler_that_ends_after_it_was_given_up_has_its_say(crew: Crew) -> None:
    """Its mail is out: where nothing has been written yet, the row is done after all."""
    crew.begin(1, 2)
    eventually(lambda: len(crew.begun) == 2, 5)
    crew.in_flight.give_up(lambda claim: Outcome(claim.delivery, Status.PENDING, 0))
    crew.may_end.set()
    eventually(lambda: [outcome.status for outcome in crew.outcomes] == ["pending"] * 2 + ["done"] * 2, 5)
    assert not crew.in_flight.unended()


def test_of_two_outcomes_that_wait_the_handlers_counts() -> None:
    """It ends between the giving up and the write: one outcome is written, and it says what happened."""
    in_flight = InFlight()
    in_flight.hold([claim_of(1)])
    in_flight.queue([claim_of(1)])
    row = in_flight.begin()
    in_flight.give_up(lambda claim: Outcome(claim.delivery, Status.PENDING, 0))
    in_flight.end(row, Outcome(Delivery(1, 1), Status.DONE, 1))
    assert in_flight.collect(1) == [Outcome(Delivery(1, 1), Status.DONE, 1)]
    assert in_flight.collect(0) == []


def test_a_handler_that_was_given_up_has_not_ended(crew: Crew) -> None:
    """Also once the row is released: the process must not wait for it."""
    crew.begin(1)
    eventually(lambda: crew.begun, 5)
    crew.in_flight.give_up(lambda claim: Outcome(claim.delivery, Status.PENDING, 0))
    eventually(lambda: not crew.in_flight.deliveries(), 5)
    assert crew.in_flight.has_unended()
    crew.may_end.set()
    eventually(lambda: not crew.in_flight.has_unended(), 5)


def test_a_row_is_held_until_its_outcome_is_written() -> None:
    """Its lease is renewed, and there is room for another as soon as its handler has ended."""
    in_flight = InFlight()
    in_flight.hold([claim_of(1), claim_of(2)])
    in_flight.queue([claim_of(1), claim_of(2)])
    in_flight.end(in_flight.begin(), Outcome(Delivery(1, 1), Status.DONE, 1))
    in_flight.collect(1)
    assert in_flight.wait_until(1, 0) == 1
    assert in_flight.deliveries() == {Delivery(1, 1), Delivery(2, 1)}
    in_flight.release([Delivery(1, 1)])
    assert in_flight.wait_until(1, 0) == 1
    assert in_flight.deliveries() == {Delivery(2, 1)}
    assert in_flight.handled == 1


def test_the_outcome_of_a_row_that_is_not_held_makes_no_room() -> None:
    """While Postgres is away, it waits to be collected: a handler runs all the same, and a wait for it is a wait."""
    in_flight = InFlight()
    in_flight.hold([claim_of(1)])
    in_flight.queue([claim_of(1)])
    row = in_flight.begin()
    in_flight.put(unanswered(Delivery(2, 1)))
    assert in_flight.wait_until(0, 0) == 1
    in_flight.collect(0)
    assert in_flight.wait_until(0, 0) == 1
    in_flight.end(row, Outcome(Delivery(1, 1), Status.DONE, 1))
    assert in_flight.wait_until(0, 0) == 0


def test_a_row_whose_return_is_not_written_is_not_begun() -> None:
    """Redis may have its job twice: the row would be given back while its handler runs."""
    in_flight = InFlight()
    in_flight.put(unanswered(Delivery(1, 1)))
    assert in_flight.deliveries() == {Delivery(1, 1)}
    in_flight.collect(0)
    assert in_flight.deliveries() == {Delivery(1, 1)}
    in_flight.release([Delivery(1, 1)])
    assert not in_flight.deliveries()


@pytest.mark.parametrize("error", [MemoryError(), SystemExit(1), ValueError("a fault of ours")])
def test_a_thread_outlives_whatever_an_attempt_raises(error: BaseException) -> None:
    """Its row is tried again, the attempt counts, and the next row is handled by the same thread."""

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


def test_the_outcome_is_put_before_the_log_is_written() -> None:
    """A log that blocks or raises holds up no outcome, and ends no thread."""
    may_go_on = Event()

    def report() -> None:
        may_go_on.wait(10)
        raise ZeroDivisionError

    crew = Crew(lambda claim: Attempted(Outcome(claim.delivery, Status.DONE, 1), report), count=1)
    crew.begin(1)
    eventually(lambda: crew.outcomes, 5, "it is put while its log is being written")
    eventually(lambda: not crew.in_flight.deliveries(), 5, "nothing is held any more")
    crew.begin(2)
    may_go_on.set()
    eventually(lambda: len(crew.outcomes) == 2, 5, "the thread goes on")
    crew.threads.check()
    crew.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("has_outcome", [True, False])
def test_a_thread_that_ended_is_noticed_and_its_row_is_not_lost(
    has_outcome: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it had in hand has an outcome all the same when the worker ends: its own, where it had one."""
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


def test_where_no_thread_can_be_started_the_worker_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With some threads it goes on; with none it must end, and what it was given is given back."""

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


def test_a_row_that_comes_twice_is_begun_once(crew: Crew) -> None:
    """Two attempts of one row at once would be two mails."""
    crew.threads.begin([claim_of(1), claim_of(1)])
    eventually(lambda: crew.begun, 5)
    crew.may_end.set()
    crew.wait_until_empty()
    crew.begin(2)
    eventually(lambda: 2 in crew.begun, 5)
    assert crew.begun == [1, 2]


def test_an_attempt_is_overdue_past_its_limit_and_a_grace(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from when its handler began, however long it had waited for a thread."""
    monkeypatch.setattr("outbox_worker.in_flight.OVERTIME", 0.3)
    started = time.monotonic()
    crew.begin(1, timeout=1)
    crew.begin(2, 3, 4)
    crew.begin(5, timeout=1)
    eventually(crew.in_flight.overdue, 5)
    assert time.monotonic() - started > 1.2
    assert rows_of(crew.in_flight.overdue()) == [1]
    crew.may_end.set()
    eventually(lambda: not crew.in_flight.overdue(), 5)
