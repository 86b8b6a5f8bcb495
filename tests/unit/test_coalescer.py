"""Concurrent calls become one batch, and each caller gets its own result."""

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
    """Doubles numbers and records its calls; the first call waits until it may go on."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.go_on = threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        """Doubles the numbers; refuses 13."""
        self.calls.append(list(numbers))
        assert self.go_on.wait(30)
        if 13 in numbers:
            raise ValueError("unlucky")
        return [2 * number for number in numbers]


@pytest.fixture
def doubling() -> Doubling:
    """The function that runs batches."""
    return Doubling()


def test_a_single_call_runs_at_once(doubling: Doubling) -> None:
    """It does not wait for other calls."""
    doubling.go_on.set()
    coalescer: Coalescer[int, int] = Coalescer()
    assert [coalescer(number, doubling) for number in (1, 2)] == [2, 4]
    assert doubling.calls == [[1], [2]]


def test_calls_that_arrive_during_a_batch_form_the_next(doubling: Doubling) -> None:
    """Nine calls that arrive while the first runs are one batch."""
    coalescer: Coalescer[int, int] = Coalescer()
    with ThreadPoolExecutor(10) as threads:
        results = [threads.submit(coalescer, number, doubling) for number in range(10)]
        eventually(lambda: len(coalescer._waiting) == 9)
        doubling.go_on.set()
        assert [result.result(5) for result in results] == [2 * number for number in range(10)]
    assert [len(call) for call in doubling.calls] == [1, 9]


def test_an_error_reaches_every_call_of_its_batch_only(doubling: Doubling) -> None:
    """Every caller of the batch gets the error; the batches before and after it succeed."""
    coalescer: Coalescer[int, int] = Coalescer()
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(coalescer, 1, doubling)
        eventually(lambda: doubling.calls == [[1]])
        others = [threads.submit(coalescer, number, doubling) for number in (12, 13, 14)]
        eventually(lambda: len(coalescer._waiting) == 3)
        doubling.go_on.set()
        assert first.result(5) == 2
        for each in others:
            with pytest.raises(ValueError, match="unlucky"):
                each.result(5)
    assert coalescer(12, doubling) == 24


def test_a_caller_waits_no_longer_than_its_attempt_has_time(doubling: Doubling) -> None:
    """The batch before it may hang on a connection, and has a time limit of its own."""
    coalescer: Coalescer[int, int] = Coalescer()

    def call() -> int:
        deadline.limit(time.monotonic() + 0.2)
        return coalescer(2, doubling)

    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(coalescer, 1, doubling)
        eventually(lambda: doubling.calls == [[1]])
        with pytest.raises(TimeLimitError):
            copy_context().run(call)
        doubling.go_on.set()
        assert first.result(5) == 2
    assert coalescer(3, doubling) == 6, "the lock is free"
