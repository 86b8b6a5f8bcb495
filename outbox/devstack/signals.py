"""Waits that end with Ctrl-C, SIGTERM or a closed terminal: the first asks `outbox up` to stop, the second to hurry."""

import signal

from outbox.runtime.stop import Stop

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):  # noqa: N818 - it says what was asked for, and is no error
    """This process was asked to stop."""


def wait_unless_stopped(stop: Stop, seconds: float) -> None:
    """Waits.

    Raises:
        Stopped: a stop was requested, now or earlier.
    """
    if stop.wait(seconds):
        raise Stopped
