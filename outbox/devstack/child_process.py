"""A child process: how one is started and ended, and what its parent wants to know meanwhile."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from outbox.errors import StartError

POLL = 0.05
"""Seconds between two looks at something that has no way to tell."""


def _ignore(_: str, __: subprocess.Popen[bytes]) -> None: ...


@dataclass(frozen=True)
class Supervisor:
    """What the parent of children has a say in. The defaults wait as told, take no note and never hurry."""

    wait: Callable[[float], None] = time.sleep
    """Waits that many seconds while a child starts; raises whatever is to end the start."""
    started: Callable[[str, subprocess.Popen[bytes]], None] = _ignore
    """Called with a name and the process right after each start."""
    hurried: Callable[[], bool] = lambda: False
    """Whether children that are being stopped are to be given no more time."""


def spawn(
    supervisor: Supervisor,
    name: str,
    command: Sequence[object],
    output: int | IO[Any],
    *,
    environment: Mapping[str, str] | None = None,
    user: Mapping[str, Any] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a child in a session of its own, so that a terminal's Ctrl-C reaches its parent alone.

    Args:
        supervisor: is told of the start.
        name: what messages call the child.
        command: the program and its arguments: strings and paths.
        output: takes standard output and standard error.
        environment: its environment; the parent's unless given.
        user: `subprocess.Popen`'s arguments that make it run as another user, or with another umask.

    Raises:
        StartError: the system refuses to run the program.
    """
    try:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            **(user or {}),
        )
    except OSError as error:
        raise StartError(f"{name} cannot be started: {error}") from error
    supervisor.started(name, process)
    return process


def end(
    supervisor: Supervisor,
    process: subprocess.Popen[bytes],
    ask: signal.Signals,
    limit: float,
    insist: signal.Signals = signal.SIGKILL,
) -> None:
    """Ends a child: asks it to, insists after a time limit or when hurried, and kills its session in the end.

    Args:
        supervisor: may hurry.
        process: the child; may have ended already.
        ask: the signal for an orderly end.
        limit: seconds for that.
        insist: the signal for an end at once, given 5 seconds.
    """
    if process.poll() is not None:
        return
    _signal(process, ask)
    deadline = time.monotonic() + limit
    while process.poll() is None and time.monotonic() < deadline and not supervisor.hurried():
        time.sleep(POLL)
    if insist is not signal.SIGKILL and process.poll() is None:
        _signal(process, insist)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)
