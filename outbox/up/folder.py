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

from outbox import logs
from outbox.errors import StartError
from outbox.up.child import POLL
from outbox.up.unprivileged import is_root

_SAME_START = 1.0
"""Seconds by which two readings of one process' start may differ; a clock that was set moves them."""
_ORDER = ("service", "relay", "worker", "redis", "postgres", "initdb")
_PATIENCE = 10.0
"""Seconds for a left-over process to end in order, before it is killed."""


class DataFolder:
    """A data folder that this process holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mails = path / "mails"
        self._processes = path / "processes.jsonl"

    def secret_key(self) -> str:
        """Returns the folder's SECRET_KEY, made at the first call ever and readable by its owner alone.

        Raises:
            StartError: it can be neither read nor written.
        """
        file = self.path / "secret_key"
        try:
            if not file.exists():
                unfinished = file.with_suffix(".unfinished")
                unfinished.unlink(missing_ok=True)
                descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w", encoding="ascii") as output:
                    output.write(secrets.token_hex(32))
                unfinished.rename(file)
            return file.read_text(encoding="ascii")
        except OSError as error:
            raise StartError(f"{file} cannot be used: {error.strerror}") from error

    def remember(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Writes down a child that was just started, for the next `outbox up`, should this one be killed."""
        with suppress(psutil.NoSuchProcess):
            entry = {"name": name, "pid": process.pid, "started": psutil.Process(process.pid).create_time()}
            with self._processes.open("a", encoding="utf-8") as output:
                output.write(json.dumps(entry) + "\n")

    def forget(self) -> None:
        """Forgets all children: they have ended."""
        self._processes.unlink(missing_ok=True)

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
        lines = self._processes.read_text(encoding="utf-8").splitlines() if self._processes.exists() else []
        for line in lines:
            # A line that was cut short by the kill, a process that is gone, or its number in another's hands.
            with suppress(ValueError, psutil.NoSuchProcess):
                entry = json.loads(line)
                process = psutil.Process(entry["pid"])
                if abs(process.create_time() - entry["started"]) < _SAME_START:
                    found.append((entry["name"], process))
        return sorted(found, key=lambda pair: _ORDER.index(pair[0]))


@contextmanager
def held(path: Path) -> Iterator[DataFolder]:
    """Makes the data folder if need be, and holds it against any other `outbox up` until the block is left.

    The hold ends with this process, however that ends; its children do not inherit it.

    Raises:
        StartError: the folder is in use, or cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o711 if is_root() else 0o700)
        (path / "mails").mkdir(mode=0o700, exist_ok=True)
        lock = (path / "lock").open("a+", encoding="ascii")
    except OSError as error:
        raise StartError(f"the data folder {path} cannot be used: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(
                f"the data folder {path} is in use by another 'outbox up': stop that, or choose another with --data"
            ) from None
        yield DataFolder(path.resolve())


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
