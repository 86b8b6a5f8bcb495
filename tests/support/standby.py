"""Runs a Postgres and its streaming standby, which can change roles in a fail-over."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg

from outbox.devstack.binaries import postgres_programs
from outbox.devstack.child_process import Supervisor, end, spawn
from outbox.devstack.embedded import EmbeddedServer, embedded_postgres, socket_folder
from outbox.devstack.unprivileged import chown_to_unprivileged
from tests.support.processes import take_down
from tests.support.waiting import eventually

KEPT = "wal_keep_size=64MB"
"""The setting by which a new primary keeps the WAL that the old one lacks when it returns as a standby."""
_SETTINGS = ("fsync=off", KEPT)


@dataclass
class Pair:
    """A primary, and the standby to which it streams."""

    primary: EmbeddedServer
    standby: EmbeddedServer
    folders: dict[str, Path]
    """Folder of each server's data and sockets, by its URL."""
    address: Path
    """A link to the socket folder of one of the two, like a name in DNS."""

    @property
    def url(self) -> str:
        """The database at the address."""
        return _url(self.address)

    @property
    def both_url(self) -> str:
        """The database at whichever of the two accepts writes."""
        hosts = ",".join(quote(str(folder)) for folder in self.folders.values())
        return f"postgresql://outbox@/outbox?host={hosts}&target_session_attrs=read-write"

    def fail_over(self) -> None:
        """Promotes the standby; the old primary returns as its standby. The address does not move."""
        take_down(self.primary)
        with psycopg.connect(self.standby.url, autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")
        self.primary, self.standby = self.standby, self.primary
        make_standby(self.folders[self.standby.url], self.primary.url)
        self.standby.restart()
        eventually(lambda: is_standby(self.standby), 30, "the old primary has returned as a standby")

    def move_address(self) -> None:
        """Makes the address point to the primary."""
        moved = self.address.with_name("moved")
        moved.symlink_to(self.folders[self.primary.url])
        moved.replace(self.address)


@contextmanager
def streaming_pair(folder: Path) -> Iterator[Pair]:
    """Runs a primary and its standby, with an address that points to the primary.

    Args:
        folder: an empty folder with a short path, because it holds sockets.
    """
    with (
        embedded_postgres(folder / "first", settings=_SETTINGS) as first,
        standby(folder / "second", first.url, settings=_SETTINGS) as second,
    ):
        pair = Pair(
            first, second, {first.url: folder / "first" / "data", second.url: folder / "second"}, folder / "address"
        )
        pair.move_address()
        yield pair


@contextmanager
def standby(
    data: Path, primary_url: str, *, settings: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[EmbeddedServer]:
    """Copies a primary, and runs the copy as its standby until the end of the block.

    Args:
        data: the data folder of the copy, which is created; its log is beside it.
        primary_url: the URL of the primary, on this machine.
        settings: parameters such as `fsync=off`.
        environment: environment of the server; by default that of this process.

    Yields:
        The server, once it answers.
    """
    backup = [str(postgres_programs() / "pg_basebackup"), "-D", str(data), "-R", "-N", "-c", "fast", "-d", primary_url]
    subprocess.run(backup, check=True, capture_output=True)
    for lock in data.glob(".s.PGSQL*"):
        lock.unlink()
    log = data.with_suffix(".log")
    user = chown_to_unprivileged(data)
    with socket_folder(data) as sockets:
        os.chown(sockets, user.get("user", -1), user.get("group", -1))
        options = [part for setting in ("listen_addresses=", *settings) for part in ("-c", setting)]
        command = [postgres_programs() / "postgres", "-D", data, "-k", f'"{sockets}"', *options]

        def start() -> subprocess.Popen[bytes]:
            with log.open("ab") as output:
                return spawn(Supervisor(), "postgres", command, output, environment=environment, run_as=user)

        server = EmbeddedServer("postgres", _url(sockets), log, start(), start)
        try:
            eventually(lambda: is_standby(server), 30, "the standby answers")
            yield server
        finally:
            end(Supervisor(), server.process, signal.SIGQUIT, 30)


def make_standby(data: Path, primary_url: str) -> None:
    """Configures a stopped server to start as a standby.

    Args:
        data: its data folder.
        primary_url: the primary that it follows.
    """
    with (data / "postgresql.auto.conf").open("a") as settings:
        settings.write(f"primary_conninfo = '{primary_url}'\n")
    (data / "standby.signal").touch()
    os.chown(data / "standby.signal", data.stat().st_uid, data.stat().st_gid)


def is_standby(server: EmbeddedServer) -> bool:
    """Whether a server answers and is a standby."""
    try:
        with psycopg.connect(server.url) as connection:
            return connection.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
    except psycopg.OperationalError:
        return False


def _url(sockets: Path) -> str:
    return f"postgresql://outbox@/outbox?host={quote(str(sockets))}"
