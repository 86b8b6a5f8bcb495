"""The time limit of an attempt: an exception in the handler's thread, and never outside of the handler's call."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class TimeLimitReached(BaseException):
    """The call took longer than it may. No Exception, so that a handler's `except Exception` lets it pass."""


def call_within(seconds: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a function and returns what it returns.

    What blocks in the system (a read, a lock) is interrupted only when it returns: it needs a limit of its own.

    Raises:
        TimeLimitReached: it took longer than `seconds`.
    """
    limit = _Limit(seconds)
    results: list[R] = []
    try:
        limit.start()
        try:
            results.append(function(*args, **kwargs))
        finally:
            limit.lift()
    except TimeLimitReached:
        limit.lift()  # it may have struck while it was being lifted; it strikes once only
        if not results:  # else the work was done, and must not be done again
            raise
    return results[0]


@contextmanager
def held_back() -> Iterator[None]:
    """Keeps the limit of this thread's call from striking inside the block; it strikes afterwards."""
    limit: _Limit | None = getattr(_current, "limit", None)
    with limit.lock if limit else nullcontext():
        yield


_current = threading.local()


class _Limit:
    def __init__(self, seconds: float) -> None:
        self._thread = threading.get_ident()
        self._is_over = False
        self._has_struck = False
        self.lock = threading.Lock()  # whoever holds it is not struck
        self._timer = threading.Timer(seconds, self._strike)
        self._timer.daemon = True

    def start(self) -> None:
        """Starts the time."""
        _current.limit = self
        self._timer.start()

    def _strike(self) -> None:
        with self.lock:
            if not self._is_over:
                self._has_struck = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread), ctypes.py_object(TimeLimitReached)
                )

    def lift(self) -> None:
        """Ends the limit. A strike that has not been felt yet is felt here, and not later."""
        with self.lock:
            self._is_over = True
        _current.limit = None
        self._timer.cancel()
        if self._has_struck:
            # The interpreter looks for it at every jump back. Taking it back instead is no way: CPython 3.11 then
            # looks for ever, and under a tracer goes no further.
            for _ in range(100):
                pass
