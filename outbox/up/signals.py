"""Ctrl-C, SIGTERM and a closed terminal: the first asks `outbox up` to stop, the second to hurry."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

AGAIN = 0.5
"""Seconds within which signals are one request: one Ctrl-C may arrive twice, from the terminal and from `just`."""


class Stopped(Exception):  # noqa: N818 - it says what was asked for, and is no error
    """Somebody asked this process to stop."""


class StopSignals:
    """Counts requests to stop, while it is entered; must be entered in the main thread."""

    def __init__(self) -> None:
        # A plain number: a handler that took a lock could meet the main thread holding it.
        self._requests = 0
        self._asked_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def ask(self) -> None:
        """Asks to stop without a signal, and never hurries."""
        self._requests = max(self._requests, 1)

    def hurried(self) -> bool:
        """Returns whether somebody asked twice."""
        return self._requests > 1

    def wait(self, seconds: float) -> None:
        """Waits, and notices a request within 0.1 s.

        Raises:
            Stopped: there was one, now or earlier.
        """
        deadline = time.monotonic() + seconds
        while not self._requests and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        if self._requests:
            raise Stopped

    def _handle(self, _: int, __: FrameType | None) -> None:
        now = time.monotonic()
        if not self._requests:
            self._requests, self._asked_at = 1, now
        elif now - self._asked_at > AGAIN:
            self._requests = 2
