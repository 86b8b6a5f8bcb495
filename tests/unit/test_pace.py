"""A pace that what comes by the thousand keeps to."""

import pytest

from outbox_worker.pace import Pace


def test_few_events_wait_for_nothing_and_many_are_spread() -> None:
    """Each waits for those before it, up to a limit."""
    pace = Pace(rate=10, most=5)
    waits = [pace.wait() for _ in range(1000)]
    assert waits[0] == 0
    assert waits[10] == pytest.approx(1, abs=0.2)
    assert max(waits) <= 5
    assert waits[-1] == pytest.approx(5, abs=0.2)


def test_what_is_over_is_not_waited_for() -> None:
    """A rate that nobody reaches puts nothing off."""
    pace = Pace(rate=1e9, most=5)
    assert max(pace.wait() for _ in range(100)) < 0.1
