"""What many threads want at once is made once, and each gets its own."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest

from outbox.errors import TimeLimitError
from outbox_worker import deadline
from outbox_worker.coalescer import Coalescer
from tests.support.waiting import eventually


class Doubling:
    """Doubles numbers, and keeps what it was called with; the first call waits until it may go on."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.go_on = threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        """Doubles them, except 13."""
        self.calls.append(list(numbers))
        while len(self.calls) == 1 and not self.go_on.is_set():
            time.sleep(0.001)
        if 13 in numbers:
            raise ValueError("unlucky")
        return [2 * number for number in numbers]


@pytest.fixture
def doubling() -> Doubling:
    """What is to be made."""
    return Doubling()


def test_alone_it_is_made_at_once(doubling: Doubling) -> None:
    """Nobody waits for company."""
    doubling.go_on.set()
    together: Coalescer[int, int] = Coalescer()
    assert [together(number, doubling) for number in (1, 2)] == [2, 4]
    assert doubling.calls == [[1], [2]]


def test_who_comes_meanwhile_goes_together(doubling: Doubling) -> None:
    """While the first is made, nine others gather, and are one call."""
    together: Coalescer[int, int] = Coalescer()
    with ThreadPoolExecutor(10) as threads:
        made = [threads.submit(together, number, doubling) for number in range(10)]
        eventually(lambda: len(together._waiting) == 9)
        doubling.go_on.set()
        assert [each.result(5) for each in made] == [2 * number for number in range(10)]
    assert [len(call) for call in doubling.calls] == [1, 9]


def test_an_error_is_everybodys_and_ends_there(doubling: Doubling) -> None:
    """All who were in the same call hear of it, nobody else does, and the next call is made as ever."""
    together: Coalescer[int, int] = Coalescer()
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(together, 1, doubling)
        eventually(lambda: doubling.calls == [[1]])
        others = [threads.submit(together, number, doubling) for number in (12, 13, 14)]
        eventually(lambda: len(together._waiting) == 3)
        doubling.go_on.set()
        assert first.result(5) == 2
        for each in others:
            with pytest.raises(ValueError, match="unlucky"):
                each.result(5)
    assert together(12, doubling) == 24


def test_a_caller_waits_no_longer_than_its_attempt_has_time(doubling: Doubling) -> None:
    """The one before it may hang on a connection, and has a time limit of its own."""
    together: Coalescer[int, int] = Coalescer()

    def call() -> int:
        deadline.limit(time.monotonic() + 0.2)
        return together(2, doubling)

    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(together, 1, doubling)
        eventually(lambda: doubling.calls == [[1]])
        with pytest.raises(TimeLimitError):
            copy_context().run(call)
        doubling.go_on.set()
        assert first.result(5) == 2
    assert together(3, doubling) == 6, "nothing is left locked"
