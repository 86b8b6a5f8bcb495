"""A request to stop a process, and a second one to hurry."""

import signal
import time
from collections.abc import Callable, Iterable
from threading import Event, Thread

SIGNALS = (signal.SIGTERM, signal.SIGINT)

AGAIN = 0.5
"""Seconds within which signals are one request: one Ctrl-C may arrive twice, from the terminal and from the process
that has started this one."""


class Stop:
    """Whether this process is to stop, and whether to hurry. Safe to share between threads.

    It may be requested before anything waits for it, many times, and in the middle of a wait.
    """

    def __init__(self) -> None:
        self._requested = Event()
        self._hurried = Event()
        self._signalled_at: float | None = None
        self.requested_at: float | None = None
        """When it was first requested, by the monotonic clock."""

    def request(self) -> None:
        """Asks for a stop: take nothing new, and end what runs."""
        if self.requested_at is None:
            self.requested_at = time.monotonic()
        self._requested.set()

    def hurry(self) -> None:
        """Asks not to wait for what runs."""
        self._hurried.set()

    def is_requested(self) -> bool:
        """Whether a stop was requested."""
        return self._requested.is_set()

    def is_hurried(self) -> bool:
        """Whether nothing is to be waited for."""
        return self._hurried.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits for the request, up to `seconds` if given, and returns whether it is there."""
        return self._requested.wait(seconds)

    def signalled(self) -> None:
        """Requests a stop as a signal does: the second, later than `AGAIN`, hurries."""
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
        elif now - self._signalled_at > AGAIN:
            self.hurry()
        self.request()

    def listen(self, then: Callable[[], object] = lambda: None, *, signals: Iterable[signal.Signals] = SIGNALS) -> None:
        """Has signals request a stop, and call `then` each time. To be called in the main thread.

        It is done in a thread of its own: a signal may strike while the main thread holds the lock that it needs.
        """

        def request() -> None:
            self.signalled()
            then()

        def handle(*_: object) -> None:
            try:
                Thread(target=request, daemon=True).start()
            except RuntimeError:  # no thread can be started
                request()

        for number in signals:
            signal.signal(number, handle)


def ignore_signals() -> None:
    """Has SIGTERM and SIGINT change nothing any more.

    While the interpreter shuts down, they would kill the process, and the exit code would tell of a failure.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
