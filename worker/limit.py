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
        self._lock = threading.Lock()  # no strike once the call is over
        self._timer = threading.Timer(seconds, self._strike)
        self._timer.daemon = True
        self.start = self._timer.start

    def _strike(self) -> None:
        with self._lock:
            if not self._is_over:
                _set_exception(self._thread, ctypes.py_object(TimeLimitReached))

    def lift(self) -> None:
        """Ends the limit; a strike that has not been felt yet is taken back."""
        with self._lock:
            self._is_over = True
        _set_exception(self._thread, None)
        self._timer.cancel()


def _set_exception(thread: int, exception: object) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)
