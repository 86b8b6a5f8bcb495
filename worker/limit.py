"""The time limit of an attempt: an exception in the handler's thread, and never outside of the handler's call."""

import ctypes
import math
import threading
import time
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

TICK = 0.05
"""Seconds by which a limit may be late: so often is looked for new ones, and for strikes that were held back."""
_RETRY = 0.01
"""Seconds between two looks at the limits, at least."""


class _Limit:
    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self._thread = threading.get_ident()
        self._is_over = False
        self._has_struck = False
        self.lock = threading.RLock()  # whoever holds it is not struck, and may lift the limit all the same

    def start(self) -> None:
        """Starts the time."""
        _current.limit = self
        _watch.add(self)

    def strike(self) -> bool:
        """Strikes, unless it is over; returns False where it is held back."""
        if not self.lock.acquire(blocking=False):
            return False
        try:
            if not self._is_over:
                self._has_struck = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread), ctypes.py_object(TimeLimitReached)
                )
        finally:
            self.lock.release()
        return True

    def lift(self) -> None:
        """Ends the limit. A strike that has not been felt yet is felt here, and not later."""
        with self.lock:  # a strike that has begun ends first
            self._is_over = True
        _current.limit = None
        if self._has_struck:
            # The interpreter looks for it at every jump back. Taking it back instead is no way: CPython 3.11 then
            # looks for ever, and under a tracer goes no further.
            for _ in range(100):
                pass
        _watch.remove(self)  # last: felt in there, it would leave the lock of all limits taken


class _Watch:
    """One thread that strikes for all: a timer thread per attempt would cost more than a short attempt.

    It shares no lock with the attempts: single operations on a dictionary are atomic.
    """

    def __init__(self) -> None:
        self._limits: dict[_Limit, None] = {}
        self._needed = threading.Event()
        self._start = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, limit: _Limit) -> None:
        self._limits[limit] = None
        if not self._needed.is_set():
            self._needed.set()
        if self._thread is None:
            with self._start:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="time limits", daemon=True)
                    self._thread.start()

    def remove(self, limit: _Limit) -> None:
        self._limits.pop(limit, None)

    def _run(self) -> None:
        while True:
            self._needed.wait()
            limits = list(self._limits)
            if not limits:
                self._needed.clear()
                if not self._limits:
                    continue
                self._needed.set()  # one came between the two lines before
            now = time.monotonic()
            for limit in limits:
                if limit.deadline <= now and limit.strike():
                    self.remove(limit)
            upcoming = min((limit.deadline for limit in limits if limit.deadline > now), default=math.inf)
            time.sleep(min(max(upcoming - now, _RETRY), TICK))


_watch = _Watch()
