"""Hashing passwords off the event loop, as many at a time as there are cores."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import argon2

from outbox.errors import OutboxError


class BusyError(OutboxError):
    """So many requests wait for their password's hash that one more would only wait in vain."""


def usable_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Passwords:
    """argon2id with OWASP's first choice of parameters (Password Storage Cheat Sheet): 19 MiB, 2 passes, 1 lane."""

    def __init__(self, queue: int) -> None:
        """Makes the threads.

        Args:
            queue: how many requests may wait for a thread.
        """
        cores = usable_cores()
        self._hasher = argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
        self._threads = ThreadPoolExecutor(cores, thread_name_prefix="argon2")
        self._limit = cores + queue
        self._unfinished = 0

    async def hash(self, password: str) -> str:
        """Returns the password's hash with its parameters and salt.

        Raises:
            BusyError: too many wait already.
        """
        if self._unfinished >= self._limit:
            raise BusyError("too many requests are waiting: try again in a moment")
        self._unfinished += 1
        future = self._threads.submit(self._hasher.hash, password)
        # Counted down by the thread's end and not by the request's: a client that hangs up frees no core.
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._finished))
        return await asyncio.wrap_future(future)

    def _finished(self) -> None:
        self._unfinished -= 1

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
