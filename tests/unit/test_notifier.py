"""How often the service sends hints to the relays."""

import pytest

from outbox_service.notifier import hint_interval


@pytest.mark.parametrize(("delay", "seconds"), [(0, 0.005), (0.01, 0.005), (1, 0.1), (10, 1.0), (86_400, 1.0)])
def test_the_interval_is_a_tenth_of_the_delay(delay: float, seconds: float) -> None:
    """It is at least 5 ms and at most a second."""
    assert hint_interval(delay) == seconds
