"""A Postgres and its streaming standby, which change roles as in a fail-over."""

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
from outbox.devstack.unprivileged import is_root, make_own, make_searchable
from tests.support.processes import take_down
from tests.support.waiting import eventually

KEPT = "wal_keep_size=64MB"
"""The setting by which a new primary keeps what the old one lacks when that comes back as its standby."""
_SETTINGS = ("fsync=off", KEPT)


@dataclass
class Pair:
    """Two servers, of which one streams to the other."""

    primary: EmbeddedServer
    standby: EmbeddedServer
    folders: dict[str, Path]
    """Where each one's data and sockets are, by its URL."""
    address: Path
    """A folder of sockets that leads to one of the two, as a name in DNS does."""

    @property
    def url(self) -> str:
        """The database at the address."""
        return _url(self.address)

    @property
    def both_url(self) -> str:
        """The database at whichever of the two may be written to."""
        hosts = ",".join(quote(str(folder)) for folder in self.folders.values())
        return f"postgresql://outbox@/outbox?host={hosts}&target_session_attrs=read-write"

    def fail_over(self) -> None:
        """Promotes the standby; the old primary comes back as its standby. The address stays where it is."""
        take_down(self.primary)
        with psycopg.connect(self.standby.url, autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")
        self.primary, self.standby = self.standby, self.primary
        make_standby(self.folders[self.standby.url], self.primary.url)
        self.standby.restart()
        eventually(lambda: is_standby(self.standby), 30, "the old primary is back as a standby")

    def move_address(self) -> None:
        """Makes the address lead to the primary."""
        moved = self.address.with_name("moved")
        moved.symlink_to(self.folders[self.primary.url])
        moved.replace(self.address)


@contextmanager
def streaming_pair(folder: Path) -> Iterator[Pair]:
    """Runs a primary and its standby, with an address that leads to the primary.

    Args:
        folder: an empty one of its own, with a short name: sockets are in it.
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
    """Copies a primary, and runs the copy as its standby until the block is left.

    Args:
        data: the copy's folder, which is made; its log is beside it.
        primary_url: where the primary is, on this machine.
        settings: parameters as in `fsync=off`.
        environment: of the server; the parent's unless given.

    Yields:
        The server, once it answers.
    """
    backup = [str(postgres_programs() / "pg_basebackup"), "-D", str(data), "-R", "-N", "-c", "fast", "-d", primary_url]
    subprocess.run(backup, check=True, capture_output=True)
    for lock in data.glob(".s.PGSQL*"):
        lock.unlink()
    log = data.with_suffix(".log")
    user = make_own(data)
    if is_root():
        make_searchable(data)
    with socket_folder(data) as sockets:
        os.chown(sockets, user.get("user", -1), user.get("group", -1))
        options = [part for setting in ("listen_addresses=", *settings) for part in ("-c", setting)]
        command = [postgres_programs() / "postgres", "-D", data, "-k", f'"{sockets}"', *options]

        def start() -> subprocess.Popen[bytes]:
            with log.open("ab") as output:
                return spawn(Supervisor(), "postgres", command, output, environment=environment, user=user)

        server = EmbeddedServer("postgres", _url(sockets), log, start(), start)
        try:
            eventually(lambda: is_standby(server), 30, "the standby answers")
            yield server
        finally:
            end(Supervisor(), server.process, signal.SIGQUIT, 30)


def make_standby(data: Path, primary_url: str) -> None:
    """Makes a server that is down a standby from its next start on.

    Args:
        data: its data folder.
        primary_url: whom it is to follow.
    """
    with (data / "postgresql.auto.conf").open("a") as settings:
        settings.write(f"primary_conninfo = '{primary_url}'\n")
    (data / "standby.signal").touch()
    os.chown(data / "standby.signal", data.stat().st_uid, data.stat().st_gid)


def is_standby(server: EmbeddedServer) -> bool:
    """Whether a server answers, and only replays what another writes."""
    try:
        with psycopg.connect(server.url) as connection:
            return connection.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
    except psycopg.OperationalError:
        return False


def _url(sockets: Path) -> str:
    return f"postgresql://outbox@/outbox?host={quote(str(sockets))}"
