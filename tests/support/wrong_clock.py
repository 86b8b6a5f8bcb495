"""Runs a process with a wrong clock: `CLOCK_OF=relay CLOCK_ERROR=3600 python -m tests.support.wrong_clock`.

The monotonic clock is unchanged, as on a machine that was set to a wrong time.
"""

import datetime as dt
import os
import time
from typing import Any


def set_wrong(seconds: float) -> None:
    """Shifts the time of this process permanently; must be called before anything else is imported."""
    true_time, true_time_ns, true_datetime = time.time, time.time_ns, dt.datetime

    class _DatetimeType(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, true_datetime)

    class _WrongDatetime(dt.datetime, metaclass=_DatetimeType):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Any:
            return true_datetime.fromtimestamp(time.time(), tz)

        @classmethod
        def utcnow(cls) -> Any:
            return true_datetime.fromtimestamp(time.time(), dt.UTC).replace(tzinfo=None)

    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: true_time_ns() + int(seconds * 1e9)
    dt.datetime = _WrongDatetime  # type: ignore[misc]


if __name__ == "__main__":
    set_wrong(float(os.environ["CLOCK_ERROR"]))

    from outbox.runtime.process import run_process

    run_process(os.environ["CLOCK_OF"])
