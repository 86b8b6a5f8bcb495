"""Holds back queues of mails while the mail server is away."""

import time
from collections.abc import Iterable
from threading import Lock

LOOK_INTERVAL = 1.0
"""Seconds between two looks into a queue that is held back."""
MAX_TRIAL_ROWS = 10
"""Upper bound of rows that such a look takes: the first of them that sends a mail tries the mail server."""
RECENT_ROWS = 100
"""Number of rows of a queue at which the counts are halved, so that recent rows count more."""


class HeldBackQueues:
    """Decides which queues a worker takes from while its mail server is away. Safe to share between threads.

    Whether a row sends a mail is known only once its handler runs. So a queue is held back if most of its recent rows
    were put off. Otherwise these rows would circulate between Redis and Postgres at full speed, and a worker that
    reaches its mail server would get few of them. Tasks that send no mail go on if they have a queue of their own, or
    if they outnumber the mails in their queue.
    """

    def __init__(self, queues: Iterable[str]) -> None:
        self._queues = list(queues)
        self._next_look_at: dict[str, float] = {}
        """By queue that is held back: when it is looked into next."""
        self._counts: dict[str, tuple[float, float]] = {}
        """By queue: how many rows were begun recently, and how many of them were put off."""
        self._lock = Lock()

    def record(self, queue: str, *, is_put_off: bool) -> None:
        """Records a row that was begun, and whether it was put off because the mail server is away."""
        with self._lock:
            begun, put_off = self._counts.get(queue, (0, 0))
            if begun >= RECENT_ROWS:
                begun, put_off = begun / 2, put_off / 2
            self._counts[queue] = begun, put_off = begun + 1, put_off + is_put_off
            if put_off >= MAX_TRIAL_ROWS / 2 and put_off > begun / 2:
                self._next_look_at.setdefault(queue, time.monotonic() + LOOK_INTERVAL)

    def takeable(self, room: int) -> tuple[list[str], int]:
        """Returns the queues to take from now, and how many rows to take if there is room for `room` rows."""
        if not self._next_look_at:
            return self._queues, room
        now = time.monotonic()
        with self._lock:
            due = [name for name, look_at in self._next_look_at.items() if look_at <= now]
            for name in due:
                begun, put_off = self._counts.pop(name, (0, 0))
                self._next_look_at[name] = now + LOOK_INTERVAL
                if put_off < begun / 2:
                    del self._next_look_at[name]
            names = [name for name in self._queues if name in due or name not in self._next_look_at]
            return names, min(room, MAX_TRIAL_ROWS) if any(name in self._next_look_at for name in due) else room

    def release(self) -> None:
        """Holds no queue back any more: the mail server is back."""
        if self._counts or self._next_look_at:
            with self._lock:
                self._next_look_at.clear()
                self._counts.clear()
