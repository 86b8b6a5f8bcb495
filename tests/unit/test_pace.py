"""A pace spreads events over time."""

import time

import pytest

from outbox_worker.pace import Pace
from tests.support.manual_clock import ManualClock


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """The clock by which delays are computed."""
    clock = ManualClock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_concurrent_events_are_spread_up_to_a_limit() -> None:
    """Each event is delayed by one interval more than the event before it, up to the longest delay."""
    pace = Pace(rate=10, longest=5)
    delays = [pace.next_delay() for _ in range(1000)]
    assert delays[:11] == pytest.approx([n / 10 for n in range(11)])
    assert max(delays) == delays[-1] == pytest.approx(5)


def test_events_below_the_rate_are_not_delayed(clock: ManualClock) -> None:
    """An event that comes after its interval has passed is due at once."""
    pace = Pace(rate=10, longest=5)
    for _ in range(100):
        assert pace.next_delay() == 0
        clock.advance(0.11)
