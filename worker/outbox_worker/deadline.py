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


def check() -> None:
    """Checks that the attempt has time left.

    Raises:
        TimeLimitError: it has none.
    """
    begin_step(math.inf)


def begin_step(seconds: float) -> float:
    """Returns how long a step may take: `seconds`, or what is left of the attempt's time.

    Raises:
        TimeLimitError: nothing is left of it.
    """
    left = remaining()
    if not left:
        raise TimeLimitError("the attempt's time is over")
    return min(seconds, left)
