"""Runs a Postgres with a clock that tests can set. All other processes keep the true time.

libfaketime does not work here: while a process waits, it shows the true time to signal handlers, which delays a
`lock_timeout` that expires then by as much as the clock is ahead. So we preload a small library of our own, which needs
a C compiler.
"""

import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from outbox.devstack.embedded import EmbeddedServer, embedded_postgres

_SOURCE = Path(__file__).with_suffix(".c")


class NoFakedClockError(Exception):
    """This machine cannot run a server with a faked clock."""


class FakedClock:
    """The clock of one server. A change takes effect immediately, also in open sessions."""

    def __init__(self, library: Path) -> None:
        """Creates the file that the server's processes map, set to the true time."""
        file = library.with_suffix(".ahead")
        self.environment = {"LD_PRELOAD": str(library), "FAKED_CLOCK": str(file)}
        """The environment in which a server uses this clock."""
        file.write_bytes(struct.pack("=q", 0))
        file.chmod(0o644)
        with file.open("r+b") as opened:
            self._mapped = mmap.mmap(opened.fileno(), 8)

    @property
    def ahead(self) -> float:
        """Seconds by which it is ahead of the true time; negative if it is behind."""
        (microseconds,) = struct.unpack("=q", self._mapped[:])
        return float(microseconds / 1_000_000)

    def set_ahead(self, seconds: float) -> None:
        """Jumps to the true time plus `seconds`, which may be negative."""
        self._mapped[:] = struct.pack("=q", round(seconds * 1_000_000))


@dataclass
class ClockedPostgres:
    """A Postgres and its clock."""

    server: EmbeddedServer
    """Can be stopped and restarted; its clock stays as it is."""
    clock: FakedClock

    @property
    def url(self) -> str:
        """The URL for clients."""
        return self.server.url


@contextmanager
def clocked_postgres(folder: Path, *, settings: Sequence[str] = ()) -> Iterator[ClockedPostgres]:
    """Runs Postgres as `embedded_postgres` does, with a clock that can be set; it first shows the true time.

    Args:
        folder: its data folder, which is created if needed.
        settings: parameters such as `fsync=off`.

    Raises:
        NoFakedClockError: there is no C compiler, or this is not Linux.
        StartError: Postgres does not start.
    """
    compiled = _compiled()
    folder.mkdir(parents=True, exist_ok=True)
    library = folder.resolve() / "faked_clock.so"
    library.write_bytes(compiled)
    library.chmod(0o755)
    clock = FakedClock(library)
    with embedded_postgres(folder, settings=settings, environment={**os.environ, **clock.environment}) as server:
        yield ClockedPostgres(server, clock)


def why_missing() -> str:
    """Returns why `clocked_postgres` cannot run here and what to install; empty if it can."""
    try:
        _compiled()
    except NoFakedClockError as error:
        return str(error)
    return ""


@cache
def _compiled() -> bytes:
    if sys.platform != "linux":
        raise NoFakedClockError("a faked clock needs Linux")
    if (compiler := shutil.which("cc")) is None:
        raise NoFakedClockError("a faked clock needs a C compiler: apt-get install gcc")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "faked_clock.so")
        command = [compiler, "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", str(library), str(_SOURCE)]
        compiling = subprocess.run(command, capture_output=True, text=True, check=False)
        if compiling.returncode != 0:
            raise NoFakedClockError(
                f"a faked clock needs a working C compiler: apt-get install gcc libc6-dev\n{compiling.stderr}"
            )
        return library.read_bytes()
