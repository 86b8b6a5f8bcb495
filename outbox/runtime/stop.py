"""Requests to stop a process, and to hurry."""

import signal
import time
from collections.abc import Callable, Iterable
from threading import Event, Thread

SIGNALS = (signal.SIGTERM, signal.SIGINT)

SAME_SIGNAL_TIME = 0.5
"""Seconds within which two signals are one request: a Ctrl-C may arrive twice, from the terminal and from the parent
process."""


class Stop:
    """A request to stop, and then to hurry. Safe to share between threads.

    A stop may be requested before anything waits for it, more than once, and during a wait.
    """

    def __init__(self) -> None:
        self._requested = Event()
        self._hurried = Event()
        self._signalled_at: float | None = None
        self.requested_at: float | None = None
        """Time of the first request, in seconds of the monotonic clock."""

    def request(self) -> None:
        """Requests a stop: the process takes no new work and finishes what runs."""
        if self.requested_at is None:
            self.requested_at = time.monotonic()
        self._requested.set()

    def hurry(self) -> None:
        """Requests not to wait for running work."""
        self._hurried.set()

    def is_requested(self) -> bool:
        """Returns whether a stop was requested."""
        return self._requested.is_set()

    def is_hurried(self) -> bool:
        """Returns whether not to wait for running work."""
        return self._hurried.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until a stop is requested, for at most `seconds` if given; returns whether it is."""
        return self._requested.wait(seconds)

    def record_signal(self) -> None:
        """Records a signal: the first requests a stop, another more than `SAME_SIGNAL_TIME` seconds later hurries."""
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
        elif now - self._signalled_at > SAME_SIGNAL_TIME:
            self.hurry()
        self.request()

    def listen(self, then: Callable[[], object] = lambda: None, *, signals: Iterable[signal.Signals] = SIGNALS) -> None:
        """Installs signal handlers that request a stop and call `then`. Call this in the main thread.

        Each signal gets a thread, because the interrupted main thread may hold the lock that the request needs.
        """

        def request() -> None:
            self.record_signal()
            then()

        def handle(*_: object) -> None:
            try:
                Thread(target=request, daemon=True).start()
            except RuntimeError:  # no thread can be started
                request()

        for number in signals:
            signal.signal(number, handle)


def ignore_signals() -> None:
    """Ignores SIGTERM and SIGINT from now on.

    While the interpreter shuts down, they would kill the process, which would then exit with a failure.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
