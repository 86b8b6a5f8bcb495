"""Hashing passwords off the event loop, as many at a time as there are cores."""

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from nacl.pwhash import argon2id

from outbox.errors import OutboxError


class BusyError(OutboxError):
    """So many requests wait for their password's hash that one more would only wait in vain."""


def usable_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hash_password(password: str) -> str:
    """Returns a password's argon2id hash with its parameters and a new salt, as every implementation reads it.

    The parameters are OWASP's first choice (Password Storage Cheat Sheet): 19 MiB, 2 passes, 1 lane. libsodium uses
    what vector instructions the CPU has, and needs about half the time of argon2's reference implementation.
    """
    return argon2id.str(password.encode(), opslimit=2, memlimit=19 * 2**20).decode()


class PasswordHasher:
    """Threads that hash passwords."""

    def __init__(self, queue: int) -> None:
        """Makes the threads.

        Args:
            queue: how many requests may wait for a thread.
        """
        cores = usable_cores()
        self._threads = ThreadPoolExecutor(cores, thread_name_prefix="argon2")
        self._room = threading.Semaphore(cores + queue)

    async def hash(self, password: str) -> str:
        """Returns what `hash_password` does.

        Raises:
            BusyError: too many wait already.
        """
        if not self._room.acquire(blocking=False):
            raise BusyError("too many requests are waiting: try again in a moment")
        future = self._threads.submit(hash_password, password)
        # Released by the thread's end and not by the request's: a client that hangs up frees no core. The loop may be
        # closed by then.
        future.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
