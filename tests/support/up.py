"""Runs `outbox up` in a folder and finds the processes that belong to it."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from tests.support.mailbox import free_port
from tests.support.waiting import eventually

LIMIT = 60.0
"""Seconds that a test waits for an output, an answer or an exit."""

ALICE = {"username": "alice", "password": "open-sesame-42", "full_name": "Alice Doe", "email": "alice@example.com"}

_OURS = re.compile(r"(OUTBOX|DATABASE|REDIS|SMTP|LOG|SECRET|PUBLIC|MAIL|VERIFY|HTTP_SERVER)_")


class Up:
    """A running `outbox up` and its output."""

    def __init__(self, folder: Path, port: int, *, measured: bool = True, **environment: str) -> None:
        left_out = _OURS if measured else re.compile(f"{_OURS.pattern}|COVERAGE_")
        inherited = {name: value for name, value in os.environ.items() if not left_out.match(name)}
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "outbox", "up", "--data", "data"],
            cwd=folder,
            env={**inherited, "HTTP_SERVER_ADDRESS": f"127.0.0.1:{port}", "VERIFY_EMAIL_DELAY": "0", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            self.lines.extend(line.rstrip("\n") for line in output)

    @property
    def output(self) -> str:
        """All lines so far."""
        return "\n".join(self.lines)

    def await_output(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Waits until the output has so many matches of `pattern`, and returns the last one."""
        eventually(
            lambda: len(re.findall(pattern, self.output)) >= times or self.process.poll() is not None, LIMIT, pattern
        )
        self._reader.join(0 if self.process.poll() is None else LIMIT)
        matches = list(re.finditer(pattern, self.output))
        assert len(matches) >= times, f"no {pattern!r} in\n{self.output}"
        return matches[-1]

    def await_start(self, name: str, times: int = 1) -> psutil.Process:
        """Waits until `up` has started a server or process so many times, and returns the newest one."""
        return psutil.Process(int(self.await_output(rf"  started {name}  pid=(\d+)", times)[1]))

    def await_exit(self) -> int:
        """Waits for the exit and returns its code."""
        code = self.process.wait(LIMIT)
        self._reader.join(LIMIT)
        return code

    def is_ready(self) -> bool:
        """Returns whether the service says that it is ready."""
        try:
            return httpx.get(f"{self.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def create_user(self, name: str) -> bool:
        """Tries to create a user and returns whether the service confirmed it."""
        user = {**ALICE, "username": name, "email": f"{name}@example.com"}
        try:
            return httpx.post(f"{self.url}/v1/users", json=user).status_code == 201
        except httpx.TransportError:
            return False


@contextmanager
def running(folder: Path, port: int | None = None, *, measured: bool = True, **environment: str) -> Iterator[Up]:
    """Runs `up` until the block is left; it is ready when the block begins."""
    up = Up(folder, port or free_port(), measured=measured, **environment)
    try:
        up.await_output(r"  ready  |\"event\": ?\"ready\"")
        yield up
    finally:
        up.process.send_signal(signal.SIGINT)
        up.await_exit()


def processes_in(folder: Path) -> list[psutil.Process]:
    """Returns the processes that work in a folder or name it in their arguments."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_named = any(str(folder) in part for part in process.cmdline())
            if process.pid != os.getpid() and (is_named or Path(process.cwd()).is_relative_to(folder)):
                found.append(process)
    return found


def assert_stopped_in_order(up: Up, folder: Path) -> None:
    """Asserts that `up` ended without an error and left no process behind."""
    assert up.process.returncode == 0, up.output
    assert processes_in(folder) == []
    assert re.findall(r"  up +(\w+) stopped", up.output) == ["service", "relay", "worker"]
    assert "Traceback" not in up.output
