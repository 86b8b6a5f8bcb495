"""The functions of the peers' jobs, the same as the handlers in `bench.handlers`."""

import time

SLEEP_SECONDS = 0.05
"""Seconds that a job of the part `sleep` waits, here and in our handler."""


def noop() -> None:
    """Does nothing."""


def sleep() -> None:
    """Waits, as a call to another server would."""
    time.sleep(SLEEP_SECONDS)
