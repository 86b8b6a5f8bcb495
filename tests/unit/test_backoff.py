"""Delays of retries."""

import random

import pytest

from outbox.backoff import reconnect_delay, retry_delay, unhandled_delay


@pytest.mark.parametrize("attempt", [1, 2, 3, 10, 25, 1001])
def test_a_retry_waits_as_asynq_does(attempt: int) -> None:
    """The n-th retry waits n⁴ + 15 seconds plus a random part of up to 30 · (n + 1)."""
    retried = attempt - 1
    minimum = retried**4 + 15
    for seed in range(50):
        assert minimum <= retry_delay(attempt, random.Random(seed)) <= minimum + 30 * attempt


def test_rows_that_failed_together_are_spread() -> None:
    """The random part spreads their first retries over half a minute."""
    draw = random.Random(1)
    delays = [retry_delay(1, draw) for _ in range(200)]
    assert max(delays) - min(delays) > 20


@pytest.mark.parametrize("failures", [1, 2, 3, 4, 5, 100, 10**6])
def test_a_server_is_tried_again_within_a_second(failures: int) -> None:
    """The delay doubles from 0.1 s up to 1 s, however long the outage."""
    ceiling = min(1.0, 0.1 * 2 ** min(failures - 1, 10))
    for seed in range(50):
        assert ceiling / 2 <= reconnect_delay(failures, random.Random(seed)) <= ceiling


@pytest.mark.parametrize(
    ("age", "ahead", "ceiling"),
    [(0, 0, 0.25), (0.5, 0, 0.25), (4, 0, 2), (60, 0, 15), (3600, 0, 15), (0, 5, 5), (0, 99, 15)],
)
def test_an_unhandled_row_is_offered_less_and_less_often(age: float, ahead: float, ceiling: float) -> None:
    """First at once, so that another worker gets it; in the end, or if there are many, every 15 s."""
    for seed in range(50):
        assert ceiling / 2 <= unhandled_delay(age, ahead, random.Random(seed)) <= ceiling
