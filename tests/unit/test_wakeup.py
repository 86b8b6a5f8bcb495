"""How often the service gives hints."""

import pytest

from outbox_service.wakeup import debounce


@pytest.mark.parametrize(("delay", "seconds"), [(0, 0.005), (0.01, 0.005), (1, 0.1), (10, 1.0), (86_400, 1.0)])
def test_the_debounce_is_a_tenth_of_the_delay(delay: float, seconds: float) -> None:
    """It is 5 ms at least and a second at most."""
    assert debounce(delay) == seconds
