"""Uses a data folder as `outbox up` does, for tests that prepare it as another user would."""

import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outbox.devstack.child_process import Supervisor, end, spawn
from outbox.devstack.data_folder import locked_folder
from outbox.devstack.embedded import embedded_postgres, embedded_redis
from outbox.devstack.mail_catcher import catch_mails
from outbox.devstack.unprivileged import is_root

OTHER_UID = 54321
"""A uid that is neither root's nor this user's."""

needs_root = pytest.mark.skipif(not is_root(), reason="needs root to prepare a folder of another owner")


def use_data(data: Path) -> None:
    """Reads and writes every file that `outbox up` itself keeps in its data folder."""
    with locked_folder(data) as folder:
        folder.stop_leftovers(lambda _: None)
        with sleeper() as process:
            folder.record_process("relay", process)
        folder.secret_key()
        with catch_mails(folder.mails):
            pass


def use_redis(data: Path) -> None:
    """Runs Redis in a data folder."""
    with embedded_redis(data / "redis"):
        pass


def use_postgres(data: Path) -> None:
    """Runs Postgres in a data folder."""
    with embedded_postgres(data / "postgres"):
        pass


Use = Callable[[Path], None]
FILES: list[tuple[str, Use]] = [
    ("lock", use_data),
    ("processes.jsonl", use_data),
    ("secret_key", use_data),
    ("redis/redis.log", use_redis),
    ("postgres/postgres.log", use_postgres),
]
"""The files in a data folder, with a function that uses each."""
FOLDERS: list[tuple[str, Use]] = [
    ("mails", use_data),
    ("redis", use_redis),
    ("postgres", use_postgres),
    ("postgres/data", use_postgres),
]
"""The folders in a data folder, with a function that uses each."""


@contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Runs a process that does nothing until the block is left."""
    process = spawn(Supervisor(), "sleeper", ["sleep", "60"], subprocess.DEVNULL)
    try:
        yield process
    finally:
        end(Supervisor(), process, signal.SIGKILL, 10)


def mode_of(path: Path) -> int:
    """Returns the permission bits of a file or folder."""
    return stat.S_IMODE(path.lstat().st_mode)
