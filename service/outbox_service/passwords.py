"""Hashes passwords in threads, one per core, so that the event loop is not blocked."""

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from nacl.pwhash import argon2id

from outbox.errors import OutboxError


class BusyError(OutboxError):
    """Too many requests wait for a password's hash."""


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hash_password(password: str) -> str:
    """Returns the password's argon2id hash with a new salt, in the standard encoding that includes the parameters.

    The parameters are OWASP's first choice (Password Storage Cheat Sheet): 19 MiB, 2 passes, 1 lane. libsodium uses
    the CPU's vector instructions, and takes about half the time of argon2's reference implementation.
    """
    return argon2id.str(password.encode(), opslimit=2, memlimit=19 * 2**20).decode()


class PasswordHasher:
    """Hashes passwords in a pool of threads, with a bounded queue."""

    def __init__(self, queue: int) -> None:
        """Makes the pool.

        Args:
            queue: maximum requests that wait for a thread.
        """
        cores = usable_cores()
        self._threads = ThreadPoolExecutor(cores, thread_name_prefix="argon2")
        self._room = threading.Semaphore(cores + queue)

    async def hash(self, password: str) -> str:
        """Returns `hash_password(password)`, computed in a thread.

        Raises:
            BusyError: the queue is full.
        """
        if not self._room.acquire(blocking=False):
            raise BusyError("too many requests are waiting: try again in a moment")
        future = self._threads.submit(hash_password, password)
        # Released when the hash is done, not when the request ends: a client that disconnects frees no core. By then
        # the loop may be closed.
        future.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
