"""Limits the waits, statements and mail steps of an attempt to the time that it has left."""

import math
import time
from contextvars import ContextVar

from outbox.errors import TimeLimitError

_deadline: ContextVar[float] = ContextVar("_deadline", default=math.inf)
"""Seconds of the monotonic clock. A context variable, because pools and connections do not know the attempt."""


def limit(deadline: float) -> None:
    """Limits all further steps in the current context to `deadline`, in seconds of the monotonic clock."""
    _deadline.set(deadline)


def remaining() -> float:
    """Returns the seconds that are left, at least 0; infinity outside an attempt."""
    return max(0.0, _deadline.get() - time.monotonic())


def check() -> None:
    """Checks that the attempt has time left.

    Raises:
        TimeLimitError: the attempt has no time left.
    """
    begin_step(math.inf)


def begin_step(seconds: float) -> float:
    """Returns how long a step may take: `seconds`, or the rest of the attempt's time if that is less.

    Raises:
        TimeLimitError: the attempt has no time left.
    """
    left = remaining()
    if not left:
        raise TimeLimitError("the attempt's time is over")
    return min(seconds, left)
