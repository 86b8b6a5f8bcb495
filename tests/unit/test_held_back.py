"""Queues that a worker holds back while its mail server is away."""

import time

import pytest

from outbox_worker.held_back import LOOK_INTERVAL, MAX_TRIAL_ROWS, HeldBackQueues
from tests.support.manual_clock import ManualClock

MAILS, OTHERS = "critical", "default"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """The clock by which looks are due."""
    clock = ManualClock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def record(held: HeldBackQueues, queue: str, *, put_off: int = 0, done: int = 0) -> None:
    """Records rows that were put off and rows that were done."""
    for _ in range(put_off):
        held.record(queue, is_put_off=True)
    for _ in range(done):
        held.record(queue, is_put_off=False)


def test_a_queue_of_mails_is_looked_into_once_per_interval(clock: ManualClock) -> None:
    """A look takes a few rows, however much room there is; other queues are taken from without limit."""
    held = HeldBackQueues([MAILS, OTHERS])
    assert held.takeable(500) == ([MAILS, OTHERS], 500)
    record(held, MAILS, put_off=30)
    record(held, OTHERS, done=30)
    for _ in range(3):
        assert held.takeable(500) == ([OTHERS], 500)
        clock.advance(LOOK_INTERVAL)
        assert held.takeable(500) == ([MAILS, OTHERS], MAX_TRIAL_ROWS)
        record(held, MAILS, put_off=MAX_TRIAL_ROWS)


def test_an_empty_queue_of_mails_stays_held_back(clock: ManualClock) -> None:
    """A look that finds no row changes nothing."""
    held = HeldBackQueues([MAILS])
    record(held, MAILS, put_off=30)
    for _ in range(3):
        assert held.takeable(500) == ([], 500)
        clock.advance(LOOK_INTERVAL)
        assert held.takeable(500) == ([MAILS], MAX_TRIAL_ROWS)


def test_a_queue_with_a_few_mails_is_not_held_back(clock: ManualClock) -> None:
    """Recent rows count: it is released although it was full of mails before."""
    held = HeldBackQueues([OTHERS])
    record(held, OTHERS, put_off=3)
    assert held.takeable(500) == ([OTHERS], 500)
    record(held, OTHERS, put_off=30)
    clock.advance(LOOK_INTERVAL)
    assert held.takeable(500) == ([OTHERS], MAX_TRIAL_ROWS)
    record(held, OTHERS, put_off=2, done=8)
    clock.advance(LOOK_INTERVAL)
    assert held.takeable(500) == ([OTHERS], 500)
    for _ in range(100):
        record(held, OTHERS, put_off=1, done=4)
    assert held.takeable(500) == ([OTHERS], 500)
    record(held, OTHERS, put_off=200)
    assert held.takeable(500) == ([], 500)


def test_all_queues_are_released_at_once(clock: ManualClock) -> None:
    """When the mail server is back, the worker takes from all queues without limit."""
    held = HeldBackQueues([MAILS, OTHERS])
    record(held, MAILS, put_off=30)
    held.release()
    assert held.takeable(500) == ([MAILS, OTHERS], 500)
