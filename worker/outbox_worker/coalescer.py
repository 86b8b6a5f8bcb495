"""Coalesces concurrent calls into one batch."""

from collections import deque
from collections.abc import Callable, Sequence
from threading import TIMEOUT_MAX, Lock
from typing import Generic, TypeVar

from outbox.errors import TimeLimitError
from outbox_worker import deadline

Item = TypeVar("Item")
Result = TypeVar("Result")


class Coalescer(Generic[Item, Result]):
    """Coalesces concurrent calls: those that arrive while a batch runs wait and form the next batch.

    A call without concurrent calls runs at once. A statement per row costs Postgres a commit and its thread a round
    trip; a statement for thirty rows costs little more.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Call[Item, Result]] = deque()
        self._leading = Lock()

    def __call__(self, item: Item, run: Callable[[Sequence[Item]], Sequence[Result]]) -> Result:
        """Returns the result for this caller's item. Waits no longer than the attempt has time.

        Args:
            item: the caller's part of the batch.
            run: returns the results for a batch of items, in the same order. It is called in the thread of the call
                that leads the batch, and never in two threads at once.

        Raises:
            TimeLimitError: the attempt has no time left to wait for the batch before.
            Exception: the error that `run` raised, in each thread of the batch.
        """
        call: _Call[Item, Result] = _Call(item)
        self._waiting.append(call)
        if not self._leading.acquire(timeout=deadline.begin_step(TIMEOUT_MAX)):
            raise TimeLimitError("the attempt's time is over")
        try:
            if not call.is_over:
                self._lead(call, run)
        finally:
            self._leading.release()
        if call.error is not None:
            raise call.error
        return call.results[0]

    def _lead(self, own: "_Call[Item, Result]", run: Callable[[Sequence[Item]], Sequence[Result]]) -> None:
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        calls = [own, *(call for call in waiting if call is not own)]
        try:
            results = run([call.item for call in calls])
        except Exception as error:  # noqa: BLE001 - each caller raises it
            for call in calls:
                call.error = error
                call.is_over = True
        else:
            for call, result in zip(calls, results, strict=True):
                call.results.append(result)
                call.is_over = True


class _Call(Generic[Item, Result]):
    def __init__(self, item: Item) -> None:
        self.item = item
        self.results: list[Result] = []
        """The result, once there is one."""
        self.error: Exception | None = None
        self.is_over = False
