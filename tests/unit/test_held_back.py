"""Which queues a worker takes from while its mail server is away."""

import time

import pytest

from outbox_worker import held_back
from outbox_worker.held_back import FEW, HeldBack

MAILS, OTHERS = "critical", "default"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock says."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def note(held: HeldBack, queue: str, *, put_off: int = 0, done: int = 0) -> None:
    """Notes rows."""
    for _ in range(put_off):
        held.note(queue, is_put_off=True)
    for _ in range(done):
        held.note(queue, is_put_off=False)


def test_a_queue_of_mails_is_looked_into_now_and_then(clock: list[float]) -> None:
    """A few rows a second are taken of it, however much room there is; other queues are taken from as ever."""
    held = HeldBack([MAILS, OTHERS])
    assert held.takeable(500) == ([MAILS, OTHERS], 500)
    note(held, MAILS, put_off=30)
    note(held, OTHERS, done=30)
    for _ in range(3):
        assert held.takeable(500) == ([OTHERS], 500)
        clock[0] += held_back.PAUSE
        assert held.takeable(500) == ([MAILS, OTHERS], FEW)
        note(held, MAILS, put_off=FEW)


def test_an_empty_queue_of_mails_stays_held_back(clock: list[float]) -> None:
    """That nothing was in it says nothing."""
    held = HeldBack([MAILS])
    note(held, MAILS, put_off=30)
    for _ in range(3):
        assert held.takeable(500) == ([], 500)
        clock[0] += held_back.PAUSE
        assert held.takeable(500) == ([MAILS], FEW)


def test_a_queue_with_a_few_mails_goes_on(clock: list[float]) -> None:
    """Also when there were many before: what was begun lately counts."""
    held = HeldBack([OTHERS])
    note(held, OTHERS, put_off=3)
    assert held.takeable(500) == ([OTHERS], 500)
    note(held, OTHERS, put_off=30)
    clock[0] += held_back.PAUSE
    assert held.takeable(500) == ([OTHERS], FEW)
    note(held, OTHERS, put_off=2, done=8)
    clock[0] += held_back.PAUSE
    assert held.takeable(500) == ([OTHERS], 500)
    for _ in range(100):
        note(held, OTHERS, put_off=1, done=4)
    assert held.takeable(500) == ([OTHERS], 500)
    note(held, OTHERS, put_off=200)
    assert held.takeable(500) == ([], 500)


def test_all_queues_are_taken_from_when_it_is_back(clock: list[float]) -> None:
    """At once."""
    held = HeldBack([MAILS, OTHERS])
    note(held, MAILS, put_off=30)
    held.release()
    assert held.takeable(500) == ([MAILS, OTHERS], 500)
