"""What several threads want at the same moment, done at once for all of them."""

from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Generic, TypeVar

from worker.limit import held_back

Wanted = TypeVar("Wanted")
Made = TypeVar("Made")


class Together(Generic[Wanted, Made]):
    """Turns calls from many threads into few: what is wanted while one is under way waits, and goes with the next.

    A call that nobody else makes at the same moment is made at once. A statement per row costs Postgres a commit and
    its thread a round trip; one for thirty rows costs little more.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Call[Wanted, Made]] = deque()
        self._leading = Lock()

    def __call__(self, wanted: Wanted, make: Callable[[Sequence[Wanted]], Sequence[Made]]) -> Made:
        """Returns what was made of this caller's part.

        Args:
            wanted: its part.
            make: makes all that is wanted at the moment, in the same order; called in the thread of whoever comes
                first, and never in two at once. The time limit of that thread's attempt waits meanwhile.

        Raises:
            Exception: what `make` has raised, in whoever's thread that was.
        """
        call: _Call[Wanted, Made] = _Call(wanted)
        self._waiting.append(call)
        with held_back(), self._leading:
            if not call.is_over:
                self._lead(make)
        if call.error is not None:
            raise call.error
        return call.made[0]

    def _lead(self, make: Callable[[Sequence[Wanted]], Sequence[Made]]) -> None:
        calls = [self._waiting.popleft() for _ in range(len(self._waiting))]
        try:
            for call, made in zip(calls, make([call.wanted for call in calls]), strict=True):
                call.made.append(made)
        except Exception as error:  # noqa: BLE001 - it is raised where it belongs
            for call in calls:
                call.error = error
        finally:
            for call in calls:
                call.is_over = True


class _Call(Generic[Wanted, Made]):
    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.made: list[Made] = []
        self.error: Exception | None = None
        self.is_over = False
