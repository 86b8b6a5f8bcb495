"""The threads of a worker: how much is claimed for them, and what becomes of rows that no thread gets to."""

import time
from collections.abc import Callable, Iterator
from threading import Event, Semaphore

import pytest

from outbox.jobs import Delivery
from tests.support.waiting import eventually
from worker.attempt import Attempted, Outcome
from worker.claim import Claim
from worker.errors import NoThreadsError, ThreadEndedError
from worker.slots import MOST_AHEAD, PATIENCE, Slots

COUNT = 4


class Crew:
    """Slots whose handlers end when they are let, and what they have put."""

    def __init__(self) -> None:
        self.may_end = Event()
        self._ends = Semaphore(0)
        self.begun: list[int] = []
        self.put: list[Outcome] = []
        self.slots = Slots(COUNT, self._handle, self.put.append)

    def _handle(self, claimed: Claim) -> Attempted:
        self.begun.append(claimed.delivery.row)
        ends = time.monotonic() + 10
        while not self.may_end.is_set() and not self._ends.acquire(timeout=0.01) and time.monotonic() < ends:
            pass
        return Attempted(Outcome(claimed.delivery, "done", claimed.attempt), lambda: None)

    def end(self, count: int) -> None:
        """Lets so many handlers end."""
        self._ends.release(count)

    def begin(self, *rows: int, attempt: int = 1) -> None:
        """Gives rows to the threads, which have 3 retries."""
        self.slots.begin([Claim(Delivery(row, 1), "t", "{}", "default", attempt, 3, 30, None) for row in rows])


@pytest.fixture
def crew() -> Iterator[Crew]:
    """A crew, which is let go in the end."""
    made = Crew()
    yield made
    made.may_end.set()


def test_without_a_pace_nothing_is_claimed_ahead(crew: Crew) -> None:
    """A fresh worker claims as many rows as it has threads, and one more when a thread is free."""
    assert crew.slots.wait_for_room(0) == COUNT
    crew.begin(1, 2, 3)
    assert crew.slots.wait_for_room(0) == 1
    crew.begin(4)
    assert crew.slots.wait_for_room(0.01) == 0
    crew.may_end.set()
    eventually(lambda: crew.slots.wait_for_room(0) == COUNT, 5)
    assert sorted(outcome.delivery.row for outcome in crew.put) == [1, 2, 3, 4]


def test_short_handlers_have_rows_claimed_ahead(crew: Crew) -> None:
    """Of many that end at once, more rows are claimed than there are threads, up to a limit; later, none any more."""
    crew.may_end.set()
    begun = time.monotonic()
    row = 0
    while time.monotonic() - begun < 0.5:
        room = crew.slots.wait_for_room(1)
        crew.begin(*range(row, row + room))
        row += room
    assert COUNT < crew.slots.wait_for_room(1) <= COUNT + MOST_AHEAD
    crew.slots.wait_until_empty(5)
    time.sleep(0.2)
    crew.slots.wait_for_room(1)
    time.sleep(0.2)
    assert crew.slots.wait_for_room(1) == COUNT


def test_rows_at_their_last_attempt_are_not_claimed_ahead(crew: Crew) -> None:
    """Were the worker killed, they would be dead without having begun."""
    crew.may_end.set()
    begun = time.monotonic()
    while time.monotonic() - begun < 0.3:
        crew.begin(*range(crew.slots.wait_for_room(1)))
    crew.slots.wait_until_empty(5)
    assert crew.slots.wait_for_room(1) > COUNT
    crew.begin(1, attempt=4)
    crew.slots.wait_until_empty(5)
    assert crew.slots.wait_for_room(1) == COUNT
    crew.begin(2, attempt=3)
    crew.slots.wait_until_empty(5)
    assert crew.slots.wait_for_room(1) > COUNT


def test_a_last_attempt_that_could_not_begin_is_not_taken(crew: Crew) -> None:
    """It is given back at once, whatever else has been claimed with it; where a thread is free, it comes first."""
    crew.begin(1, 2, 3)
    claims = [
        Claim(Delivery(row, 1), "t", "{}", "default", attempt, 3, 30, None) for row, attempt in ((4, 1), (5, 4), (6, 4))
    ]
    assert [claimed.delivery.row for claimed in crew.slots.begin(claims)] == [6]
    eventually(lambda: sorted(crew.begun) == [1, 2, 3, 5], 5)
    assert [claimed.delivery.row for claimed in crew.slots.take_back()] == [4]


def test_rows_that_wait_long_are_stuck_although_threads_begin_others(crew: Crew) -> None:
    """Handlers have become slow, and end one after the other: the rows behind them wait all the same."""
    crew.begin(*range(1, 11))
    eventually(lambda: len(crew.begun) == COUNT, 5)
    time.sleep(PATIENCE + 0.1)
    crew.end(1)
    eventually(lambda: len(crew.begun) == COUNT + 1, 5)
    assert crew.slots.are_stuck
    assert len(crew.slots.take_back()) == 10 - COUNT - 1
    assert not crew.slots.are_stuck


def test_a_row_that_waited_too_long_is_not_begun(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process was paused, and the row is another worker's by now: it is given back, and no attempt counts."""
    crew.begin(*range(1, COUNT + 2))
    eventually(lambda: len(crew.begun) == COUNT, 5)
    monkeypatch.setattr("worker.slots.LONGEST_WAIT", 0.1)
    time.sleep(0.2)
    crew.end(1)
    eventually(lambda: Outcome(Delivery(COUNT + 1, 1), "pending", 0) in crew.put, 5)
    assert COUNT + 1 not in crew.begun


def test_rows_that_no_thread_begins_are_taken_back(crew: Crew) -> None:
    """Handlers have become slow: what waits for a thread goes to another worker, what runs stays."""
    crew.begin(*range(1, 11))
    eventually(lambda: len(crew.begun) == COUNT, 5)
    assert not crew.slots.are_stuck
    eventually(lambda: crew.slots.are_stuck, PATIENCE + 2)
    back = crew.slots.take_back()
    assert [claimed.delivery.row for claimed in back] == [5, 6, 7, 8, 9, 10]
    assert not crew.slots.are_stuck
    assert sorted(claimed.delivery.row for claimed in crew.slots.unfinished) == [1, 2, 3, 4]
    assert not crew.put


def test_rows_that_come_after_a_quiet_time_are_not_stuck(crew: Crew) -> None:
    """However long no row began: these have only just come."""
    time.sleep(PATIENCE + 0.1)
    crew.begin(*range(1, 11))
    assert not crew.slots.are_stuck


@pytest.mark.parametrize("ends", [True, False])
def test_what_does_not_end_is_given_up(crew: Crew, ends: bool) -> None:  # noqa: FBT001
    """In the end every row has one outcome: its handler's, or that of giving up."""
    crew.begin(1, 2)
    eventually(lambda: len(crew.begun) == 2, 5)
    if ends:
        crew.may_end.set()
    crew.slots.wait_until_empty(5 if ends else 0.1)
    outcome_of: Callable[[Claim], Outcome] = lambda claimed: Outcome(claimed.delivery, "pending", 0)  # noqa: E731
    given_up = crew.slots.give_up(outcome_of)
    assert len(given_up) == (0 if ends else 2)
    assert [outcome.status for outcome in crew.put] == ["done" if ends else "pending"] * 2


def test_a_handler_that_ends_after_it_was_given_up_has_its_say(crew: Crew) -> None:
    """Its mail is out: where nothing has been written yet, the row is done after all."""
    crew.begin(1, 2)
    eventually(lambda: len(crew.begun) == 2, 5)
    crew.slots.give_up(lambda claimed: Outcome(claimed.delivery, "pending", 0))
    crew.may_end.set()
    eventually(lambda: [outcome.status for outcome in crew.put] == ["pending"] * 2 + ["done"] * 2, 5)
    assert not crew.slots.unfinished


class Trouble:
    """Slots whose handlers do what the test says."""

    def __init__(self, handle: Callable[[Claim], Attempted]) -> None:
        self.put: list[Outcome] = []
        self.slots = Slots(1, handle, self.put.append)

    def begin(self, row: int) -> None:
        """Gives one row to the thread."""
        self.slots.begin([Claim(Delivery(row, 1), "t", "{}", "default", 1, 3, 30, None)])


@pytest.mark.parametrize("error", [MemoryError(), SystemExit(1), ValueError("a fault of ours")])
def test_a_thread_outlives_whatever_an_attempt_raises(error: BaseException) -> None:
    """Its row is tried again, the attempt counts, and the next row is handled by the same thread."""

    def handle(claimed: Claim) -> Attempted:
        if claimed.delivery.row == 1:
            raise error
        return Attempted(Outcome(claimed.delivery, "done", 1), lambda: None)

    trouble = Trouble(handle)
    trouble.begin(1)
    trouble.begin(2)
    eventually(lambda: len(trouble.put) == 2, 5)
    broken, done = trouble.put
    assert (broken.status, broken.attempts, done.status) == ("pending", 1, "done")
    assert type(error).__name__ in str(broken.error)
    trouble.slots.check()


def test_the_outcome_is_put_before_the_log_is_written() -> None:
    """A log that blocks or raises holds up no outcome, and ends no thread."""
    may_go_on = Event()

    def report() -> None:
        may_go_on.wait(10)
        raise ZeroDivisionError

    trouble = Trouble(lambda claimed: Attempted(Outcome(claimed.delivery, "done", 1), report))
    trouble.begin(1)
    eventually(lambda: trouble.put, 5, "it is put while its log is being written")
    eventually(lambda: not trouble.slots.unfinished, 5, "nothing is held any more")
    trouble.begin(2)
    may_go_on.set()
    eventually(lambda: len(trouble.put) == 2, 5, "the thread goes on")
    trouble.slots.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ended_is_noticed_and_its_row_given_up() -> None:
    """What it had in hand has an outcome all the same when the worker ends."""

    def put(outcome: Outcome) -> None:
        if not given_up:
            raise SystemExit
        given_up.append(outcome)

    given_up: list[Outcome] = []
    slots = Slots(1, lambda claimed: Attempted(Outcome(claimed.delivery, "done", 1), lambda: None), put)
    claimed = Claim(Delivery(1, 1), "t", "{}", "default", 1, 3, 30, None)
    slots.begin([claimed])
    eventually(lambda: not slots._threads[0].is_alive(), 5)
    with pytest.raises(ThreadEndedError, match="handler-1"):
        slots.check()
    given_up.append(Outcome(Delivery(9, 9), "done", 1))
    assert slots.give_up(lambda one: Outcome(one.delivery, "pending", 1)) == [claimed]
    assert given_up[1:] == [Outcome(Delivery(1, 1), "pending", 1)]


def test_where_no_thread_can_be_started_the_worker_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With some threads it goes on; with none it must end, and what it was given can be taken back."""

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    slots = Slots(2, lambda claimed: Attempted(Outcome(claimed.delivery, "done", 1), lambda: None), lambda _: None)
    claimed = Claim(Delivery(1, 1), "t", "{}", "default", 1, 3, 30, None)
    with monkeypatch.context() as patched:
        patched.setattr("threading.Thread.start", refuse)
        with pytest.raises(NoThreadsError, match="can't start new thread"):
            slots.begin([claimed])
        assert slots.take_back() == [claimed]
    crew = Crew()
    crew.begin(1)
    with monkeypatch.context() as patched:
        patched.setattr("threading.Thread.start", refuse)
        crew.begin(2)
    crew.may_end.set()
    eventually(lambda: len(crew.put) == 2, 5, "the one thread does both")


def test_a_row_that_comes_twice_is_begun_once(crew: Crew) -> None:
    """Two attempts of one row at once would be two mails."""
    claimed = Claim(Delivery(1, 1), "t", "{}", "default", 1, 3, 30, None)
    crew.slots.begin([claimed, claimed])
    eventually(lambda: crew.begun, 5)
    crew.may_end.set()
    crew.slots.wait_until_empty(5)
    crew.begin(2)
    eventually(lambda: 2 in crew.begun, 5)
    assert crew.begun == [1, 2]


def test_an_attempt_is_overdue_past_its_limit_and_a_grace(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from when its handler began, however long it had waited for a thread."""
    monkeypatch.setattr("worker.slots.OVERTIME", 0.3)
    slow = Claim(Delivery(1, 1), "t", "{}", "default", 1, 3, 1, None)
    started = time.monotonic()
    crew.slots.begin([slow])
    crew.begin(2, 3, 4)
    waiting = Claim(Delivery(5, 1), "t", "{}", "default", 1, 3, 1, None)
    crew.slots.begin([waiting])
    eventually(crew.slots.overdue, 5)
    assert time.monotonic() - started > 1.2
    assert crew.slots.overdue() == [slow]
    crew.may_end.set()
    eventually(lambda: not crew.slots.overdue(), 5)
