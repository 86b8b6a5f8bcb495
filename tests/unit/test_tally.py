"""Counts of events that are logged once a minute."""

from types import SimpleNamespace

import pytest

from outbox.runtime import tally
from outbox.runtime.tally import Tally


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that a tally sees: one number, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(tally, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_kind_is_reported_once_a_minute_with_its_count(clock: list[float]) -> None:
    """The first event is reported at once, later ones together after a minute. Each kind has its own minute."""
    events = Tally()
    assert [events.count("a") for _ in range(3)] == [1, 0, 0]
    clock[0] += 59
    assert [events.count("b"), events.count("a")] == [1, 0]
    clock[0] += 1
    assert [events.count(kind) for kind in ("a", "a", "b")] == [4, 0, 0]
    clock[0] += 60
    assert [events.count("a"), events.count("b")] == [2, 2]


def test_the_number_of_kinds_is_bounded() -> None:
    """Other clients can create any number of kinds; a limited number is kept."""
    events = Tally()
    assert sum(events.count(str(number)) for number in range(3000)) == 3000
    assert len(events._kinds) <= tally.MAX_KINDS
