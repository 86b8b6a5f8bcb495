"""Postgres and Redis from wheels, as child processes on Unix sockets: for `outbox up` and for the tests."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote

import psycopg
import psycopg.sql
import redis

from outbox.devstack.binaries import postgres_programs, postgres_trees, redis_server
from outbox.devstack.child_process import POLL, Supervisor, end, spawn
from outbox.devstack.private_files import PrivateFolder, private_folder
from outbox.devstack.unprivileged import is_root, make_own, make_readable, make_searchable
from outbox.errors import StartError

_LONGEST_SOCKET_FOLDER = 80
"""Bytes. A socket's path may have 103 on macOS and 107 on Linux; `/.s.PGSQL.5432.lock` is the longest name in it."""

_INITDB_LIMIT = 120.0
_START_LIMIT = 60.0
"""Seconds until a server must answer; Postgres may have to recover from a crash first."""


@dataclass
class EmbeddedServer:
    """A server that runs as a child of this process."""

    name: str
    url: str
    """What clients connect to."""
    log: Path
    """Where its output goes."""
    process: subprocess.Popen[bytes]
    start: Callable[[], subprocess.Popen[bytes]]
    """Starts it anew and returns without waiting until it answers."""

    def restart(self) -> None:
        """Starts the server again after its process has died; what is connected finds it at the same URL.

        Raises:
            StartError: the system refuses to run the program.
        """
        self.process = self.start()


@contextmanager
def embedded_postgres(
    folder: Path,
    *,
    settings: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    supervisor: Supervisor | None = None,
) -> Iterator[EmbeddedServer]:
    """Runs Postgres, with a user and an empty database named `outbox`, until the block is left.

    Args:
        folder: where its data is, or comes to be; made if need be. One server at a time per folder.
        settings: parameters as in `fsync=off`.
        environment: of the server; the parent's unless given.
        supervisor: notes its processes, and may cut waits short.

    Yields:
        The server, once it answers.

    Raises:
        StartError: the wheel is not installed, or Postgres cannot be set up or does not come up; with its log's end.
    """
    supervisor = supervisor or Supervisor()
    with private_folder(folder) as private, private.open_log("postgres.log") as log:
        if is_root():
            make_readable(postgres_trees())
            for tree in postgres_trees():
                make_searchable(tree)
        data = _initialized(private, log, supervisor)
        user = make_own(data)
        with socket_folder(data) as sockets:
            make_own(sockets)
            options = [part for setting in ("listen_addresses=", *settings) for part in ("-c", setting)]
            command = [postgres_programs() / "postgres", "-D", data, "-k", f'"{sockets}"', *options]

            def start() -> subprocess.Popen[bytes]:
                return spawn(supervisor, "postgres", command, log, environment=environment, user=user)

            url = f"postgresql://outbox@/outbox?host={quote(str(sockets))}"
            server = EmbeddedServer("postgres", url, private.path / "postgres.log", start(), start)
            try:
                _await(server, log, lambda: _create_database(sockets), psycopg.OperationalError, supervisor)
                yield server
            finally:
                # Fast shutdown, then immediate shutdown: a plain kill would orphan Postgres' own children.
                end(supervisor, server.process, signal.SIGINT, 30, signal.SIGQUIT)


@contextmanager
def embedded_redis(
    folder: Path, *, settings: Sequence[str] = (), supervisor: Supervisor | None = None
) -> Iterator[EmbeddedServer]:
    """Runs Redis, empty and keeping nothing, until the block is left.

    Args:
        folder: where its socket and log are; made if need be. One server at a time per folder.
        settings: lines as in `redis.conf`, such as `maxmemory 100mb`.
        supervisor: notes its process, and may cut waits short.

    Yields:
        The server, once it answers.

    Raises:
        StartError: no wheel is installed, or Redis does not come up; with its log's end.
    """
    supervisor = supervisor or Supervisor()
    with (
        private_folder(folder) as private,
        private.open_log("redis.log") as log,
        socket_folder(private.path) as sockets,
    ):
        socket = sockets / "redis.sock"
        options = [("port", "0"), ("unixsocket", str(socket)), ("dir", str(private.path))]
        options += [("save", ""), ("appendonly", "no")]
        options += [(name, value) for name, _, value in (setting.partition(" ") for setting in settings)]
        command = [redis_server(), *(part for name, value in options for part in (f"--{name}", value))]

        def start() -> subprocess.Popen[bytes]:
            # With unixsocketperm instead, Redis would change the mode of whatever is at the socket's path by then.
            return spawn(supervisor, "redis", command, log, user={"umask": 0o077})

        server = EmbeddedServer("redis", f"unix://{quote(str(socket))}", private.path / "redis.log", start(), start)
        try:
            with redis.Redis(unix_socket_path=str(socket), socket_timeout=5) as client:
                _await(server, log, client.ping, redis.RedisError, supervisor)
            yield server
        finally:
            end(supervisor, server.process, signal.SIGTERM, 10)


@contextmanager
def socket_folder(folder: Path) -> Iterator[Path]:
    """Yields the folder itself where sockets may be in it, else a short one; a comma parts two hosts to libpq."""
    if len(os.fsencode(folder)) <= _LONGEST_SOCKET_FOLDER and "," not in str(folder) and '"' not in str(folder):
        yield folder
        return
    root = tempfile.gettempdir()
    if len(os.fsencode(root)) > _LONGEST_SOCKET_FOLDER - 20 or "," in root:
        root = "/tmp"  # noqa: S108 - mkdtemp makes a fresh folder of our own in it
    short = Path(tempfile.mkdtemp(prefix="outbox-", dir=root))
    try:
        with private_folder(short):
            yield short
    finally:
        shutil.rmtree(short, ignore_errors=True)


def _initialized(folder: PrivateFolder, log: IO[bytes], supervisor: Supervisor) -> Path:
    """Makes Postgres' data folder unless it is there; a run that is cut short leaves none that looks finished."""
    data = folder.path / "data"
    if not folder.has(data.name):
        unfinished = folder.path / "data.unfinished"
        shutil.rmtree(unfinished.name, ignore_errors=True, dir_fd=folder.descriptor)
        os.mkdir(unfinished.name, 0o700, dir_fd=folder.descriptor)
        user = make_own(unfinished)
        if is_root():
            make_searchable(unfinished)
        command = [postgres_programs() / "initdb", "-D", unfinished, "-U", "outbox", "--auth=trust"]
        # Sorted the same on every system, whatever its libraries.
        command += ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        command += ["--no-instructions"]
        initdb = spawn(supervisor, "initdb", command, log, user=user)
        try:
            deadline = time.monotonic() + _INITDB_LIMIT
            while (code := initdb.poll()) is None and time.monotonic() < deadline:
                supervisor.wait(POLL)
        finally:
            end(supervisor, initdb, signal.SIGINT, 5)
        if code != 0:
            raise StartError(f"initdb failed; the end of its log:\n{_last_lines(log)}")
        folder.rename(unfinished.name, data.name)
    if is_root():
        make_searchable(data)
    return data


def _create_database(sockets: Path) -> None:
    with (
        psycopg.connect(
            host=str(sockets), user="outbox", dbname="postgres", autocommit=True, connect_timeout=5
        ) as connection,
        suppress(psycopg.errors.DuplicateDatabase),
    ):
        connection.execute("CREATE DATABASE outbox")


def _await(
    server: EmbeddedServer,
    log: IO[bytes],
    greet: Callable[[], object],
    away: type[Exception],
    supervisor: Supervisor,
) -> None:
    deadline = time.monotonic() + _START_LIMIT
    while True:
        try:
            greet()
        except away as error:
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise StartError(
                    f"{server.name} does not come up; the end of its log, {server.log}:\n{_last_lines(log)}"
                ) from error
        else:
            return
        supervisor.wait(POLL)


def _last_lines(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-10:])
