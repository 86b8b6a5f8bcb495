"""Service, relay and worker as real processes; and whatever dies is started again."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Protocol

from outbox.devstack.child_process import Supervisor, end, spawn
from outbox.devstack.log_stream import Stream
from outbox.errors import SettingsError, StartError
from outbox.runtime import logs
from outbox.runtime.process import EXIT_SETTINGS

NAMES = ("service", "relay", "worker")
"""In the order in which they are stopped: first no new rows, then no new jobs."""

_STOP_LIMIT = 40.0
"""Seconds; above the 25 s that a process grants what it is doing, so that it may end by itself."""
_SETTLED = 10.0
"""Seconds after which a process that dies is no longer taken to die at its start."""
_LONGEST_PAUSE = 10.0


class Kept(Protocol):
    """Something that is to run for as long as `outbox up` does."""

    name: str
    process: subprocess.Popen[bytes]

    def restart(self) -> None:
        """Starts it anew.

        Raises:
            StartError: it cannot be.
        """


class Program:
    """One of our three processes."""

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
        """Starts it, for the first time or anew.

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
        """Ends it in order, and has its last lines written."""
        end(self._supervisor, self.process, signal.SIGTERM, _STOP_LIMIT)
        self.drain()

    def drain(self) -> None:
        """Waits until all that the ended process has printed is written; at most 1 s, should a child of it live on."""
        self._reader.join(1)

    def check_settings(self) -> None:
        """Tells a process that was set up wrongly, which no restart mends, from one that just died.

        Raises:
            SettingsError: it ended with the exit code for wrong settings; says what it said.
        """
        if self.process.poll() == EXIT_SETTINGS:
            self.drain()
            raise SettingsError(self._stream.last_words(self.name) or f"{self.name} ended because of wrong settings")


class Watch:
    """Starts again what has died, at once, or after a growing pause if it keeps dying at its start."""

    def __init__(self, kept: Iterable[Kept]) -> None:
        self._kept = tuple(kept)
        self._started = {one.name: time.monotonic() for one in self._kept}
        self._quick_deaths = dict.fromkeys(self._started, 0)
        self._due: dict[str, float] = {}

    def look(self) -> None:
        """Looks after each once; does not wait.

        Raises:
            SettingsError: one of our processes was set up wrongly.
        """
        for one in self._kept:
            if one.process.poll() is not None:
                self._mourn(one)

    def _mourn(self, one: Kept) -> None:
        now = time.monotonic()
        if one.name not in self._due:
            if isinstance(one, Program):
                one.check_settings()
            quick = now - self._started[one.name] < _SETTLED
            self._quick_deaths[one.name] = self._quick_deaths[one.name] + 1 if quick else 0
            pause = min(_LONGEST_PAUSE, 0.25 * 2 ** self._quick_deaths[one.name]) if quick else 0.0
            self._due[one.name] = now + pause
            logs.get().warning(
                f"{one.name} died: starting it again", cause=_cause(one.process.returncode), pause=f"{pause:g} s"
            )
        if now < self._due[one.name]:
            return
        del self._due[one.name]
        self._started[one.name] = now
        try:
            one.restart()
        except StartError as error:
            logs.get().error(str(error))


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
