"""Waits for a condition, with a deadline."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(check: Callable[[], T], seconds: float = 10, what: str = "the condition") -> T:
    """Calls `check` until it returns a true value, and returns that; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    pause = 0.005
    while not (result := check()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
    return result
