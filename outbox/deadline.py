"""The time that an attempt has left, which limits its waits, statements and mail steps."""

import math
import time
from contextvars import ContextVar

from outbox.errors import TimeLimitError

_deadline: ContextVar[float] = ContextVar("_deadline", default=math.inf)
"""By the monotonic clock. A context variable, because a pool and its connections know nothing of attempts."""


def limit(deadline: float) -> None:
    """Limits all further steps in the current context; `deadline` is in seconds of the monotonic clock."""
    _deadline.set(deadline)


def remaining() -> float:
    """Returns the seconds that are left, 0 at the least; infinite outside of an attempt."""
    return max(0.0, _deadline.get() - time.monotonic())


def begin_step(limit: float) -> float:
    """Returns the seconds that a step may take: `limit`, or what is left of the attempt's time.

    Raises:
        TimeLimitError: nothing is left of it.
    """
    left = remaining()
    if left <= 0:
        raise TimeLimitError("the attempt's time is over")
    return min(limit, left)
