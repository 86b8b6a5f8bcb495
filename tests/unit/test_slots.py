"""The threads of a worker: how much is claimed for them, and what becomes of rows that no thread gets to."""

import time
from collections.abc import Callable, Iterator
from threading import Event, Semaphore

import pytest

from outbox.jobs import Delivery
from tests.support.waiting import eventually
from worker.attempt import Outcome
from worker.claim import Claim
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

    def _handle(self, claimed: Claim) -> Outcome:
        self.begun.append(claimed.delivery.row)
        ends = time.monotonic() + 10
        while not self.may_end.is_set() and not self._ends.acquire(timeout=0.01) and time.monotonic() < ends:
            pass
        return Outcome(claimed.delivery, "done", claimed.attempt)

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
    """Its lease could end before its handler does: it is given back, and the attempt does not count."""
    monkeypatch.setattr("worker.slots.OVERTIME", 0.1)
    crew.begin(*range(1, COUNT + 2))
    eventually(lambda: len(crew.begun) == COUNT, 5)
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
    crew.slots.wait_until_empty(0.5)
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
