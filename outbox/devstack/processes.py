"""Runs service, relay and worker as child processes, and restarts children that die."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from outbox.devstack.child_process import Supervisor, end, spawn
from outbox.devstack.log_stream import Stream
from outbox.errors import SettingsError, StartError
from outbox.runtime import logs
from outbox.runtime.process import EXIT_SETTINGS

_STOP_LIMIT = 40.0
"""Seconds that a process has for an orderly end: more than the 25 s that OUTBOX_GRACE gives running work by default."""
_QUICK_DEATH = 10.0
"""Seconds; a process that dies within them has failed to start."""
_MAX_PAUSE = 10.0
"""Seconds between the death of a process that fails to start and its restart."""


class Restartable(Protocol):
    """A process that runs for as long as `outbox up` does."""

    name: str
    process: subprocess.Popen[bytes]

    def restart(self) -> None:
        """Starts it again.

        Raises:
            StartError: it cannot be started.
        """


class Program:
    """Service, relay or worker as a child process."""

    def __init__(self, name: str, environment: Mapping[str, str], stream: Stream, supervisor: Supervisor) -> None:
        """Starts `outbox {name}`.

        Raises:
            StartError: the system refuses to run Python.
        """
        self.name = name
        self._environment = environment
        self._stream = stream
        self._supervisor = supervisor
        self.restart()

    def restart(self) -> None:
        """Starts the process, for the first time or again.

        Raises:
            StartError: the system refuses to run Python.
        """
        # The current folder may hold another `outbox`; only the user's own handlers are imported from there.
        has_handlers = self.name == "worker" and self._environment.get("OUTBOX_HANDLERS")
        command = [sys.executable, *([] if has_handlers else ["-P"]), "-m", "outbox", self.name]
        self.process = spawn(self._supervisor, self.name, command, subprocess.PIPE, environment=self._environment)
        self._reader = threading.Thread(
            target=self._stream.follow, args=(self.name, self.process.stdout), name=f"{self.name}'s log", daemon=True
        )
        self._reader.start()

    def stop(self) -> None:
        """Stops the process, waits until its last lines are written, and logs its exit code."""
        end(self._supervisor, self.process, signal.SIGTERM, _STOP_LIMIT)
        self.drain()
        logs.get().info(f"{self.name} stopped", code=self.process.returncode)

    def drain(self) -> None:
        """Waits until all output of the ended process is written; at most 1 s, because its children may still run."""
        self._reader.join(1)

    def check_settings(self) -> None:
        """Checks whether the process ended because of wrong settings, which no restart fixes.

        Raises:
            SettingsError: it did, with its own message.
        """
        if self.process.poll() == EXIT_SETTINGS:
            self.drain()
            raise SettingsError(self._stream.last_output(self.name) or f"{self.name} ended because of wrong settings")


@dataclass
class _Watched:
    child: Restartable
    started_at: float = field(default_factory=time.monotonic)
    quick_deaths: int = 0
    """Quick deaths without a longer run between them."""
    restart_at: float | None = None
    """When to start it again; None while it runs."""


class Restarter:
    """Restarts children that die: at once, or after a growing pause if they keep failing to start."""

    def __init__(self, children: Iterable[Restartable]) -> None:
        self._watched = [_Watched(child) for child in children]

    def check(self) -> None:
        """Restarts each child that has died and whose pause is over; does not wait.

        Raises:
            SettingsError: a process ended because of wrong settings.
        """
        for watched in self._watched:
            if watched.child.process.poll() is not None:
                _handle_death(watched)


def _handle_death(watched: _Watched) -> None:
    child, now = watched.child, time.monotonic()
    if watched.restart_at is None:
        if isinstance(child, Program):
            child.check_settings()
        is_quick = now - watched.started_at < _QUICK_DEATH
        watched.quick_deaths = watched.quick_deaths + 1 if is_quick else 0
        pause = min(_MAX_PAUSE, 0.25 * 2**watched.quick_deaths) if is_quick else 0.0
        watched.restart_at = now + pause
        cause = _cause(child.process.returncode)
        logs.get().warning(f"{child.name} died: starting it again", cause=cause, pause=f"{pause:g} s")
    if now < watched.restart_at:
        return
    watched.restart_at = None
    watched.started_at = now
    try:
        child.restart()
    except StartError as error:
        logs.get().error(str(error))


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
