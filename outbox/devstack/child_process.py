"""Starts and ends child processes."""

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
"""Seconds between two checks of a state that cannot be waited for."""


def _ignore(_: str, __: subprocess.Popen[bytes]) -> None: ...


@dataclass(frozen=True)
class Supervisor:
    """What a parent process does while its children start and stop. The defaults only wait."""

    wait: Callable[[float], None] = time.sleep
    """Waits that many seconds while a child starts. An exception that it raises ends the start."""
    on_start: Callable[[str, subprocess.Popen[bytes]], None] = _ignore
    """Called with the name and the process after each start."""
    is_hurried: Callable[[], bool] = lambda: False
    """Returns whether children that are being stopped get no more time."""


def spawn(
    supervisor: Supervisor,
    name: str,
    command: Sequence[object],
    output: int | IO[Any],
    *,
    environment: Mapping[str, str] | None = None,
    run_as: Mapping[str, Any] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a child in its own session, so that a terminal's Ctrl-C reaches only its parent.

    Args:
        supervisor: its `on_start` is called.
        name: the name of the child in messages.
        command: the program and its arguments: strings and paths.
        output: receives standard output and standard error.
        environment: of the child; the parent's unless given.
        run_as: arguments of `subprocess.Popen` that set another user or umask.

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
            **(run_as or {}),
        )
    except OSError as error:
        raise StartError(f"{name} cannot be started: {error}") from error
    supervisor.on_start(name, process)
    return process


def end(
    supervisor: Supervisor,
    process: subprocess.Popen[bytes],
    first: signal.Signals,
    limit: float,
    second: signal.Signals = signal.SIGKILL,
) -> None:
    """Ends a child with one signal, then with another, and finally kills its session. Does nothing if it has ended.

    Args:
        supervisor: cuts `limit` short if it is hurried.
        process: the child.
        first: the signal for an orderly end.
        limit: seconds that the child has for an orderly end.
        second: the signal for an immediate end; the child has 5 s for it.
    """
    if process.poll() is not None:
        return
    _signal(process, first)
    deadline = time.monotonic() + limit
    while process.poll() is None and time.monotonic() < deadline and not supervisor.is_hurried():
        time.sleep(POLL)
    if second is not signal.SIGKILL and process.poll() is None:
        _signal(process, second)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)
