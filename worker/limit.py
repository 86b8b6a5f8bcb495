"""The time limit of an attempt: an exception in the handler's thread, and never outside of the handler's call."""

import ctypes
import threading
from collections.abc import Callable
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
    try:
        limit.start()
        try:
            return function(*args, **kwargs)
        finally:
            limit.lift()
    except TimeLimitReached:
        limit.lift()  # it may have struck while it was being lifted; it strikes once only
        raise


class _Limit:
    def __init__(self, seconds: float) -> None:
        self._thread = threading.get_ident()
        self._is_over = False
        self._has_struck = False
        self._lock = threading.Lock()  # no strike once the call is over
        self._timer = threading.Timer(seconds, self._strike)
        self._timer.daemon = True
        self.start = self._timer.start

    def _strike(self) -> None:
        with self._lock:
            if not self._is_over:
                self._has_struck = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread), ctypes.py_object(TimeLimitReached)
                )

    def lift(self) -> None:
        """Ends the limit. A strike that has not been felt yet is felt here, and not later."""
        with self._lock:
            self._is_over = True
        self._timer.cancel()
        if self._has_struck:
            # The interpreter looks for it at every jump back. Taking it back instead is no way: CPython 3.11 then
            # looks for ever, and under a tracer goes no further.
            for _ in range(100):
                pass
