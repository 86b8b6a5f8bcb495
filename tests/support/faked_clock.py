"""A Postgres whose clock can be set, for jumps of the server's time; every other process keeps the true time.

libfaketime does not serve: while a process waits, it shows the true time to signal handlers, and a `lock_timeout` that
expires then is put off by as much as the clock is ahead. So a small library of ours is preloaded, which needs a C
compiler.
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
    """This machine cannot run a server under a faked clock."""


class FakedClock:
    """The clock of one server. A change holds at once, in sessions that are open as well."""

    def __init__(self, library: Path) -> None:
        """Makes the file that the server's processes map; it shows the true time."""
        file = library.with_suffix(".ahead")
        self.environment = {"LD_PRELOAD": str(library), "FAKED_CLOCK": str(file)}
        """What a server needs in its environment to run by this clock."""
        file.write_bytes(struct.pack("=q", 0))
        file.chmod(0o644)
        with file.open("r+b") as opened:
            self._mapped = mmap.mmap(opened.fileno(), 8)

    @property
    def ahead(self) -> float:
        """Seconds by which it is ahead of the true time; negative where it is behind."""
        (microseconds,) = struct.unpack("=q", self._mapped[:])
        return float(microseconds / 1_000_000)

    def set_ahead(self, seconds: float) -> None:
        """Jumps to the true time and so many seconds more, or less where they are negative; 0 is the true time."""
        self._mapped[:] = struct.pack("=q", round(seconds * 1_000_000))


@dataclass
class ClockedPostgres:
    """A Postgres and its clock."""

    server: EmbeddedServer
    """May be stopped and restarted; its clock stays as it is."""
    clock: FakedClock

    @property
    def url(self) -> str:
        """What clients connect to."""
        return self.server.url


@contextmanager
def clocked_postgres(folder: Path, *, settings: Sequence[str] = ()) -> Iterator[ClockedPostgres]:
    """Runs Postgres as `embedded_postgres` does, with a clock that can be set and shows the true time at first.

    Args:
        folder: where its data is; made if need be.
        settings: parameters as in `fsync=off`.

    Raises:
        NoFakedClockError: there is no C compiler, or this is not Linux.
        StartError: Postgres does not come up.
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
    """Returns why `clocked_postgres` cannot run here and what to install; empty where it can."""
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
                f"a faked clock needs a C compiler that works: apt-get install gcc libc6-dev\n{compiling.stderr}"
            )
        return library.read_bytes()
