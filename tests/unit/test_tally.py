"""Counts of events that get one log line a minute."""

import pytest

from outbox.runtime import tally
from outbox.runtime.tally import Tally


def test_a_kind_is_told_once_a_minute_with_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first at once, and then as many as have come since; other kinds by themselves."""
    events = Tally()
    assert [events.count("a") for _ in range(3)] == [1, 0, 0]
    assert events.count("b") == 1
    monkeypatch.setattr(tally, "LOG_INTERVAL", 0.0)
    assert [events.count("a") for _ in range(2)] == [3, 1]


def test_kinds_that_others_make_up_are_bounded() -> None:
    """However many there are, few are kept."""
    events = Tally()
    assert sum(events.count(str(number)) for number in range(3000)) == 3000
    assert len(events._kinds) <= tally.MAX_KINDS
