"""What the peers' jobs do: what the handlers in `bench.handlers` do, as plain functions."""

import time

NAP = 0.05
"""Seconds that a job of the part `sleep` waits, here and in our handler."""


def nothing() -> None:
    """Does nothing."""


def nap() -> None:
    """Waits for something outside."""
    time.sleep(NAP)
