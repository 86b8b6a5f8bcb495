"""The data folder of `outbox up`: held by one at a time, and it knows what one that was killed has left running."""

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

_SAME_START = 1.0
"""Seconds by which two readings of one process' start may differ; a clock that was set moves them."""
_ORDER = ("service", "relay", "worker", "redis", "postgres", "initdb")
_PATIENCE = 10.0
"""Seconds for a left-over process to end in order, before it is killed."""
_PROCESSES = "processes.jsonl"
_SECRET_KEY = "secret_key"  # noqa: S105 - a file's name
_KEY_LENGTH = 32
"""Characters of a key, at least, as the processes want it."""


class DataFolder:
    """A data folder that this process holds."""

    def __init__(self, folder: PrivateFolder) -> None:
        self.path = folder.path
        self.mails = folder.path / "mails"
        self._folder = folder

    def secret_key(self) -> str:
        """Returns the folder's SECRET_KEY, made at the first call ever and readable by its owner alone.

        Raises:
            StartError: it can be neither read nor written.
        """
        try:
            if not self._folder.has(_SECRET_KEY):
                unfinished = f"{_SECRET_KEY}.unfinished"
                self._folder.remove(unfinished)
                descriptor = self._folder.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                with os.fdopen(descriptor, "w", encoding="ascii") as output:
                    output.write(secrets.token_hex(32))
                self._folder.rename(unfinished, _SECRET_KEY)
            with os.fdopen(self._folder.open(_SECRET_KEY, os.O_RDONLY), encoding="utf-8", errors="replace") as file:
                key = file.read()
        except OSError as error:
            raise StartError(f"{self.path / _SECRET_KEY} cannot be used: {error.strerror}") from error
        if len(key) < _KEY_LENGTH or not key.isascii():
            raise StartError(
                f"{self.path / _SECRET_KEY} holds no key: remove it, and links in unopened mails are invalid"
            )
        return key

    def remember(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Writes down a child that was just started, for the next `outbox up`, should this one be killed."""
        with suppress(psutil.NoSuchProcess):
            entry = {"name": name, "pid": process.pid, "started": psutil.Process(process.pid).create_time()}
            descriptor = self._folder.open(_PROCESSES, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            with os.fdopen(descriptor, "a", encoding="utf-8") as output:
                output.write(json.dumps(entry) + "\n")

    def forget(self) -> None:
        """Forgets all children: they have ended."""
        self._folder.remove(_PROCESSES)

    def stop_leftovers(self, wait: Callable[[float], None]) -> None:
        """Ends the processes that an `outbox up` on this folder left running because it was killed.

        Args:
            wait: waits that many seconds; may raise to give up.
        """
        for name, process in self._leftovers():
            logs.get().warning("stopping what a killed 'outbox up' left running", name=name, pid=process.pid)
            # Postgres takes SIGTERM for "when all clients have left", SIGINT for now, and SIGQUIT for at once.
            server = name in {"postgres", "initdb"}
            for number in (signal.SIGINT, signal.SIGQUIT) if server else (signal.SIGTERM,):
                _end(process, number, wait)
            _end(process, signal.SIGKILL, wait)
        self.forget()

    def _leftovers(self) -> list[tuple[str, psutil.Process]]:
        found: list[tuple[str, psutil.Process]] = []
        if not self._folder.has(_PROCESSES):
            return found
        with os.fdopen(self._folder.open(_PROCESSES, os.O_RDONLY), encoding="utf-8", errors="replace") as lines:
            remembered = lines.read().splitlines()
        for line in remembered:
            # A line that was cut short or spoilt, a process that is gone, or its number in another's hands.
            with suppress(ValueError, RecursionError, psutil.NoSuchProcess):
                match json.loads(line):
                    case {"name": str(name), "pid": int(pid), "started": float(started)} if name in _ORDER:
                        process = psutil.Process(pid)
                        if abs(process.create_time() - started) < _SAME_START:
                            found.append((name, process))
        return sorted(found, key=lambda pair: _ORDER.index(pair[0]))


@contextmanager
def held(path: Path) -> Iterator[DataFolder]:
    """Makes the data folder if need be, and holds it against any other `outbox up` until the block is left.

    The hold ends with this process, however that ends; its children do not inherit it.

    Raises:
        StartError: the folder is in use, not safe from others, or cannot be made or written to.
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
    deadline = time.monotonic() + _PATIENCE
    while _runs(process) and time.monotonic() < deadline:
        wait(POLL)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
