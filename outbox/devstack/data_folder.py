"""The data folder of `outbox up`: its lock, its secret key, and the list of processes that `up` started."""

import fcntl
import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from outbox.devstack.child_process import POLL
from outbox.devstack.private_files import LOCK, PrivateFolder, private_folder
from outbox.errors import StartError
from outbox.runtime import logs

_START_TOLERANCE = 1.0
"""Seconds by which two readings of one process' start time may differ: setting the clock moves them."""
_STOP_ORDER = ("service", "relay", "worker", "redis", "postgres", "initdb")
_LEFTOVER_LIMIT = 10.0
"""Seconds that a left-over process has for an orderly end before it is killed."""
_PROCESSES = "processes.jsonl"
_SECRET_KEY = "secret_key"  # noqa: S105 - the name of a file
_KEY_LENGTH = 32
"""Characters that the processes require of a key."""


class DataFolder:
    """A data folder that this process has locked."""

    def __init__(self, folder: PrivateFolder) -> None:
        self.path = folder.path
        self.mails = folder.path / "mails"
        self._folder = folder

    def secret_key(self) -> str:
        """Returns the SECRET_KEY of this folder, which the first call creates.

        Raises:
            StartError: the key cannot be read or written.
        """
        try:
            if not self._folder.has(_SECRET_KEY):
                self._folder.write(_SECRET_KEY, secrets.token_hex(32).encode())
            key = self._folder.read(_SECRET_KEY)
        except OSError as error:
            raise StartError(f"{self.path / _SECRET_KEY} cannot be used: {error.strerror}") from error
        if len(key) < _KEY_LENGTH or not key.isascii():
            raise StartError(
                f"{self.path / _SECRET_KEY} holds no key: remove it, which invalidates the links in unopened mails"
            )
        return key

    def record_process(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Records a child for the next `outbox up`, which ends it if this `up` was killed."""
        with suppress(psutil.NoSuchProcess):
            entry = {"name": name, "pid": process.pid, "started": psutil.Process(process.pid).create_time()}
            descriptor = self._folder.open(_PROCESSES, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            with os.fdopen(descriptor, "a", encoding="utf-8") as output:
                output.write(json.dumps(entry) + "\n")

    def forget_processes(self) -> None:
        """Removes all records, because the children have ended."""
        self._folder.remove(_PROCESSES)

    def stop_leftovers(self, wait: Callable[[float], None]) -> None:
        """Ends the processes of an earlier `outbox up` on this folder that was killed.

        Args:
            wait: waits that many seconds; may raise to give up.
        """
        for name, process in self._leftovers():
            logs.get().warning("stopping what a killed 'outbox up' left running", name=name, pid=process.pid)
            # To Postgres, SIGTERM means to wait for its clients, SIGINT to disconnect them, SIGQUIT to end at once.
            is_postgres = name in {"postgres", "initdb"}
            for number in (signal.SIGINT, signal.SIGQUIT) if is_postgres else (signal.SIGTERM,):
                _end(process, number, wait)
            _end(process, signal.SIGKILL, wait)
        self.forget_processes()

    def _leftovers(self) -> list[tuple[str, psutil.Process]]:
        if not self._folder.has(_PROCESSES):
            return []
        leftovers: list[tuple[str, psutil.Process]] = []
        for line in self._folder.read(_PROCESSES).splitlines():
            # Skips a truncated or damaged line, a process that has ended, and a pid that was reused.
            with suppress(ValueError, RecursionError, psutil.NoSuchProcess):
                match json.loads(line):
                    case {"name": str(name), "pid": int(pid), "started": float(started)} if name in _STOP_ORDER:
                        process = psutil.Process(pid)
                        if abs(process.create_time() - started) < _START_TOLERANCE:
                            leftovers.append((name, process))
        return sorted(leftovers, key=lambda leftover: _STOP_ORDER.index(leftover[0]))


@contextmanager
def locked_folder(path: Path) -> Iterator[DataFolder]:
    """Creates the data folder if necessary, and locks it against other `outbox up` until the block is left.

    The lock ends with this process, however that ends; its children do not inherit it.

    Raises:
        StartError: the folder is in use, not safe from other users, or cannot be created or written to.
    """
    with private_folder(path, listable=True) as folder, os.fdopen(folder.open(LOCK, os.O_RDWR | os.O_CREAT)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(
                f"the data folder {path} is in use by another 'outbox up': stop that, or choose another with --data"
            ) from None
        yield DataFolder(folder)


def _end(process: psutil.Process, number: signal.Signals, wait: Callable[[float], None]) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
    deadline = time.monotonic() + _LEFTOVER_LIMIT
    while _is_running(process) and time.monotonic() < deadline:
        wait(POLL)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
