"""Coalesces concurrent calls into one batch."""

from collections import deque
from collections.abc import Callable, Sequence
from threading import TIMEOUT_MAX, Lock
from typing import Generic, TypeVar

from outbox.errors import TimeLimitError
from outbox_worker import deadline

Wanted = TypeVar("Wanted")
Made = TypeVar("Made")


class Coalescer(Generic[Wanted, Made]):
    """Turns calls from many threads into few: what is wanted while one is under way waits, and goes with the next.

    A call that nobody else makes at the same moment is made at once. A statement per row costs Postgres a commit and
    its thread a round trip; one for thirty rows costs little more.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Call[Wanted, Made]] = deque()
        self._leading = Lock()

    def __call__(self, wanted: Wanted, make: Callable[[Sequence[Wanted]], Sequence[Made]]) -> Made:
        """Returns what was made of this caller's part. Waits no longer than the attempt has time.

        Args:
            wanted: its part.
            make: makes all that is wanted at the moment, in the same order; called in the thread of whoever comes
                first, and never in two at once.

        Raises:
            TimeLimitError: the attempt has no time left to wait for the calls before.
            Exception: what `make` has raised, in the thread that called it.
        """
        call: _Call[Wanted, Made] = _Call(wanted)
        self._waiting.append(call)
        if not self._leading.acquire(timeout=deadline.begin_step(TIMEOUT_MAX)):
            raise TimeLimitError("the attempt's time is over")
        try:
            if not call.is_over:
                self._lead(call, make)
        finally:
            self._leading.release()
        if call.error is not None:
            raise call.error
        return call.made[0]

    def _lead(self, own: "_Call[Wanted, Made]", make: Callable[[Sequence[Wanted]], Sequence[Made]]) -> None:
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        calls = [own, *(call for call in waiting if call is not own)]
        try:
            made = make([call.wanted for call in calls])
        except Exception as error:  # noqa: BLE001 - it is raised where it belongs
            for call in calls:
                call.error = error
                call.is_over = True
        else:
            for call, part in zip(calls, made, strict=True):
                call.made.append(part)
                call.is_over = True


class _Call(Generic[Wanted, Made]):
    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.made: list[Made] = []
        self.error: Exception | None = None
        self.is_over = False
