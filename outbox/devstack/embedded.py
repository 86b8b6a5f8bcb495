"""Runs Postgres and Redis from wheels as child processes on Unix sockets, for `outbox up` and for the tests."""

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
from outbox.devstack.unprivileged import check_readable, chown_to_unprivileged, is_root, make_searchable
from outbox.errors import StartError

_LONGEST_SOCKET_FOLDER = 80
"""Bytes. The path of a socket may have 103 on macOS and 107 on Linux; the longest name is `/.s.PGSQL.5432.lock`."""
_INITDB_LIMIT = 120.0
"""Seconds."""
_START_LIMIT = 60.0
"""Seconds until a server must answer. Postgres may first have to recover from a crash."""


@dataclass
class EmbeddedServer:
    """A server that runs as a child of this process."""

    name: str
    url: str
    """The URL for clients."""
    log: Path
    """The file with its output."""
    process: subprocess.Popen[bytes]
    start: Callable[[], subprocess.Popen[bytes]]
    """Starts it again and returns before it answers."""

    def restart(self) -> None:
        """Starts the server again, at the same URL, after its process has died.

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
        folder: for its data; created if necessary. One server at a time per folder.
        settings: parameters as in `fsync=off`.
        environment: of the server; the parent's unless given.
        supervisor: as of `spawn` and `end`.

    Yields:
        The server, once it answers.

    Raises:
        StartError: the wheel is not installed, or Postgres cannot be set up or does not start: with the end of its log.
    """
    supervisor = supervisor or Supervisor()
    with private_folder(folder) as private, private.open_log("postgres.log") as log:
        if is_root():
            check_readable(postgres_trees())
            make_searchable(*postgres_trees())
        data = _initialized(private, log, supervisor)
        user = chown_to_unprivileged(data)
        with socket_folder(data) as sockets:
            chown_to_unprivileged(sockets)
            options = [part for setting in ("listen_addresses=", *settings) for part in ("-c", setting)]
            command = [postgres_programs() / "postgres", "-D", data, "-k", f'"{sockets}"', *options]

            def start() -> subprocess.Popen[bytes]:
                return spawn(supervisor, "postgres", command, log, environment=environment, run_as=user)

            url = f"postgresql://outbox@/outbox?host={quote(str(sockets))}"
            server = EmbeddedServer("postgres", url, private.path / "postgres.log", start(), start)
            try:
                _wait_until_ready(server, log, lambda: _create_database(sockets), psycopg.OperationalError, supervisor)
                yield server
            finally:
                # Fast shutdown, then immediate shutdown: SIGKILL would orphan Postgres' own children.
                end(supervisor, server.process, signal.SIGINT, 30, signal.SIGQUIT)


@contextmanager
def embedded_redis(
    folder: Path, *, settings: Sequence[str] = (), supervisor: Supervisor | None = None
) -> Iterator[EmbeddedServer]:
    """Runs an empty Redis without persistence until the block is left.

    Args:
        folder: for its socket and log; created if necessary. One server at a time per folder.
        settings: lines as in `redis.conf`, such as `maxmemory 100mb`.
        supervisor: as of `spawn` and `end`.

    Yields:
        The server, once it answers.

    Raises:
        StartError: no wheel is installed, or Redis does not start: with the end of its log.
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
            # unixsocketperm instead would change the mode of any file that has replaced the socket.
            return spawn(supervisor, "redis", command, log, run_as={"umask": 0o077})

        server = EmbeddedServer("redis", f"unix://{quote(str(socket))}", private.path / "redis.log", start(), start)
        try:
            with redis.Redis(unix_socket_path=str(socket), socket_timeout=5) as client:
                _wait_until_ready(server, log, client.ping, redis.RedisError, supervisor)
            yield server
        finally:
            end(supervisor, server.process, signal.SIGTERM, 10)


@contextmanager
def socket_folder(folder: Path) -> Iterator[Path]:
    """Yields the folder, or a temporary one if the path is too long or has a comma, which separates hosts in libpq."""
    if len(os.fsencode(folder)) <= _LONGEST_SOCKET_FOLDER and "," not in str(folder) and '"' not in str(folder):
        yield folder
        return
    root = tempfile.gettempdir()
    if len(os.fsencode(root)) > _LONGEST_SOCKET_FOLDER - 20 or "," in root:
        root = "/tmp"  # noqa: S108 - mkdtemp creates a folder that only this user may access
    short = Path(tempfile.mkdtemp(prefix="outbox-", dir=root))
    try:
        with private_folder(short):
            yield short
    finally:
        shutil.rmtree(short, ignore_errors=True)


def _initialized(folder: PrivateFolder, log: IO[bytes], supervisor: Supervisor) -> Path:
    """Creates Postgres' data folder unless it exists. An interrupted run leaves none that looks complete."""
    data = folder.path / "data"
    if not folder.has(data.name):
        unfinished = folder.path / "data.unfinished"
        shutil.rmtree(unfinished.name, ignore_errors=True, dir_fd=folder.descriptor)
        os.mkdir(unfinished.name, 0o700, dir_fd=folder.descriptor)
        user = chown_to_unprivileged(unfinished)
        command = [postgres_programs() / "initdb", "-D", unfinished, "-U", "outbox", "--auth=trust"]
        # The same sort order on every system.
        command += ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        command += ["--no-instructions"]
        initdb = spawn(supervisor, "initdb", command, log, run_as=user)
        try:
            deadline = time.monotonic() + _INITDB_LIMIT
            while (code := initdb.poll()) is None and time.monotonic() < deadline:
                supervisor.wait(POLL)
        finally:
            end(supervisor, initdb, signal.SIGINT, 5)
        if code != 0:
            raise StartError(f"initdb failed; the end of its log:\n{_last_lines(log)}")
        folder.rename(unfinished.name, data.name)
    return data


def _create_database(sockets: Path) -> None:
    with (
        psycopg.connect(
            host=str(sockets), user="outbox", dbname="postgres", autocommit=True, connect_timeout=5
        ) as connection,
        suppress(psycopg.errors.DuplicateDatabase),
    ):
        connection.execute("CREATE DATABASE outbox")


def _wait_until_ready(
    server: EmbeddedServer,
    log: IO[bytes],
    ping: Callable[[], object],
    not_ready: type[Exception],
    supervisor: Supervisor,
) -> None:
    deadline = time.monotonic() + _START_LIMIT
    while True:
        try:
            ping()
        except not_ready as error:
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise StartError(
                    f"{server.name} does not start; the end of its log, {server.log}:\n{_last_lines(log)}"
                ) from error
        else:
            return
        supervisor.wait(POLL)


def _last_lines(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-10:])
