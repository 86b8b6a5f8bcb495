"""Weights of queues: how the room of a worker is split among them."""

import random
from collections import Counter

import pytest

from outbox_worker.queues import shares_of, weighted_order

DEFAULT = {"critical": 10, "default": 5}


@pytest.mark.parametrize("weights", [DEFAULT, {"a": 1}, {"a": 1, "b": 1}, {"a": 7, "b": 2, "c": 1}])
@pytest.mark.parametrize("count", [1, 2, 3, 15, 32])
def test_shares_add_up_and_are_fair(count: int, weights: dict[str, int]) -> None:
    """Shares add up to the count, and on average each queue gets its weight's share."""
    draw = random.Random(1)
    rounds = 4000
    total: Counter[str] = Counter()
    for _ in range(rounds):
        shares = shares_of(count, weights, draw)
        assert sum(shares.values()) == count
        for name, weight in weights.items():
            exact = count * weight / sum(weights.values())
            assert exact - 1 < shares[name] < exact + 1, "each share is only rounded"
        total.update(shares)
    for name, weight in weights.items():
        assert total[name] / (rounds * count) == pytest.approx(weight / sum(weights.values()), abs=0.03)


def test_a_count_that_divides_is_split_exactly() -> None:
    """With weights 10 : 5, fifteen jobs are always split into ten and five."""
    assert all(shares_of(15, DEFAULT) == {"critical": 10, "default": 5} for _ in range(50))


def test_the_heavier_queue_is_first_two_times_in_three() -> None:
    """The order, in which a worker fills the rest of its room or waits, follows the weights too."""
    draw = random.Random(1)
    first = Counter(weighted_order(DEFAULT, draw)[0] for _ in range(6000))
    assert first["critical"] / 6000 == pytest.approx(2 / 3, abs=0.03)
    assert first["default"] > 0


def test_any_names_and_weights_are_ordered() -> None:
    """OUTBOX_QUEUES sets names and weights; every order has every queue."""
    draw = random.Random(1)
    weights = {"a": 1, "b": 1, "c": 8}
    orders = [weighted_order(weights, draw) for _ in range(3000)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    first = Counter(order[0] for order in orders)
    assert first["c"] / 3000 == pytest.approx(0.8, abs=0.03)
    assert first["a"] / 3000 == pytest.approx(0.1, abs=0.03)
