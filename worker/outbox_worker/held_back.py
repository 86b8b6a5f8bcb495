"""Queues whose rows are left where they are while the mail server is away."""

import time
from collections.abc import Iterable
from threading import Lock

PAUSE = 1.0
"""Seconds between two looks into a queue that is held back."""
FEW = 10
"""Rows that such a look takes at most: the first of them that needs a mail tries the mail server."""
MEMORY = 100
"""Rows of a queue after which those before count half."""


class HeldBack:
    """Which queues a worker takes from while its mail server is away. Safe to share between threads.

    What a row needs is known only once its handler runs. So a queue is held back where most of the rows that were begun
    lately were put off: else they would go to and fro between Redis and Postgres as fast as all can, and a worker whose
    mail server is there would get few of them. Tasks that need no mail go on: in a queue of their own as ever, and
    beside mails as long as they are more.
    """

    def __init__(self, queues: Iterable[str]) -> None:
        self._queues = list(queues)
        self._look_at: dict[str, float] = {}
        """When a queue that is held back is looked into next."""
        self._begun: dict[str, tuple[float, float]] = {}
        """By queue: how many rows were begun lately, and how many of them were put off."""
        self._lock = Lock()

    def note(self, queue: str, *, is_put_off: bool) -> None:
        """Takes note of a row that was begun, and whether it was put off because the mail server is away."""
        with self._lock:
            begun, put_off = self._begun.get(queue, (0, 0))
            if begun >= MEMORY:
                begun, put_off = begun / 2, put_off / 2
            self._begun[queue] = begun, put_off = begun + 1, put_off + is_put_off
            if put_off >= FEW / 2 and put_off > begun / 2:
                self._look_at.setdefault(queue, time.monotonic() + PAUSE)

    def takeable(self, room: int) -> tuple[list[str], int]:
        """Returns the queues to take from now, and how many rows to take where there is room for so many."""
        if not self._look_at:
            return self._queues, room
        now = time.monotonic()
        with self._lock:
            due = [name for name, look_at in self._look_at.items() if look_at <= now]
            for name in due:
                begun, put_off = self._begun.pop(name, (0, 0))
                self._look_at[name] = now + PAUSE
                if put_off < begun / 2:
                    del self._look_at[name]
            names = [name for name in self._queues if name in due or name not in self._look_at]
            return names, min(room, FEW) if any(name in self._look_at for name in due) else room

    def release(self) -> None:
        """Takes from all queues again: the mail server is back."""
        if self._begun or self._look_at:
            with self._lock:
                self._look_at.clear()
                self._begun.clear()
