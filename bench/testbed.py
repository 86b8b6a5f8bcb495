"""Provides servers, databases and processes to the parts of the bench, and measures contenders in turn."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import redis
from psycopg import sql
from rich.console import Console

from bench.figure import Figure
from bench.process import Process
from outbox.devstack.embedded import embedded_postgres, embedded_redis
from outbox.runtime.migrations import migrate

_EXCLUDED = (
    *("OUTBOX_", "DATABASE_URL", "REDIS_URL", "SMTP_", "MAIL_", "HTTP_SERVER", "PUBLIC_URL", "VERIFY_", "LOG_"),
    *("SECRET_KEY", "BENCH_", "COVERAGE_", "PGQUEUER_", "PROCRASTINATE_", "RQ_"),
)
"""Prefixes of environment variables that configure our processes, the bench or a peer."""
_PEER_TIMEOUT = 180.0
"""Seconds that the program of a peer may take."""


class Bench:
    """Servers, databases, processes and the size of a run."""

    def __init__(
        self, server_url: str, redis_url: str, folder: Path, *, runs: int, smoke: bool, console: Console
    ) -> None:
        self.database_url = server_url
        """The newest database that `reset` created."""
        self.redis_url = redis_url
        self.folder = folder
        """For logs and other files of a part."""
        self.runs = runs
        """Number of runs of each contender."""
        self.smoke = smoke
        """Whether this run only checks that every part works."""
        self._console = console
        self._server_url = server_url
        self._ids = count(1)
        self._template: str | None = None
        self._databases: list[str] = []
        self._current: str | None = None

    def size(self, full: int, smoke: int) -> int:
        """Returns the size for this run: `smoke` in a smoke run, else `full`."""
        return smoke if self.smoke else full

    def reset(self) -> None:
        """Empties Redis, and replaces the current database by an empty, migrated one with a new name.

        No process may still use the previous database: it is dropped.
        """
        self.empty_redis()
        if self._current:
            self._databases.remove(self._current)
            self._drop(self._current)
        if self._template is None:
            self._template = self._create_from("template1")
            migrate(self._url_of(self._template))
        self._current = self._create_from(self._template)
        self._databases.append(self._current)
        self.database_url = self._url_of(self._current)

    def create_database(self) -> str:
        """Creates an empty database, which is dropped when the part ends, and returns its URL."""
        name = self._create_from("template1")
        self._databases.append(name)
        return self._url_of(name)

    def clear(self) -> None:
        """Drops all databases but the template, and empties Redis. Called at the end of a part."""
        while self._databases:
            self._drop(self._databases.pop())
        self._current = None
        self.empty_redis()

    def close(self) -> None:
        """Drops all databases and empties Redis."""
        self.clear()
        if self._template:
            self._drop(self._template)
            self._template = None

    def empty_redis(self) -> None:
        """Empties Redis."""
        with self.redis_client() as client:
            client.flushall()

    def environment(self, **overrides: str) -> dict[str, str]:
        """Returns the complete environment for one of our processes. It logs warnings only.

        Args:
            overrides: variables that are added or replaced.
        """
        return {
            **self._inherited_environment(),
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.redis_url,
            "SMTP_URL": "smtp://127.0.0.1:1",  # a closed port; parts that send mail pass their own URL
            "MAIL_FROM": "Sign-up <no-reply@example.com>",
            "PUBLIC_URL": "https://example.com",
            "SECRET_KEY": "a secret key for the bench, 32 characters or more",
            "VERIFY_EMAIL_DELAY": "0",
            "LOG_LEVEL": "warning",
            "LOG_FORMAT": "json",
            **overrides,
        }

    def start(self, module: str, **env: str) -> Process:
        """Starts `python -m module` and returns at once. The process is a context manager that stops it.

        Args:
            module: `relay`, `worker`, `service` or a module of the bench.
            env: overrides for `environment`.
        """
        log = self.folder / f"{module}-{next(self._ids)}.log"
        return Process(module, self.environment(**env), log, measured=False)

    def run_peer(self, module: str, *arguments: object) -> float:
        """Runs `python -m bench.peers.module` and returns the last number that it prints.

        Args:
            module: name of the module.
            arguments: its command line.

        Raises:
            RuntimeError: it failed. The message has its output.
        """
        command = [sys.executable, "-m", f"bench.peers.{module}", *map(str, arguments)]
        done = subprocess.run(  # noqa: S603 - our own programs
            command,
            env=self._inherited_environment(),
            capture_output=True,
            text=True,
            timeout=_PEER_TIMEOUT,
            check=False,
        )
        words = done.stdout.split()
        if done.returncode != 0 or not words:
            raise RuntimeError(f"the peer {module} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return float(words[-1])

    def connect(self) -> psycopg.Connection[Any]:
        """Opens a connection to the current database, in autocommit mode."""
        return psycopg.connect(self.database_url, autocommit=True, application_name="bench")

    def redis_client(self) -> redis.Redis:
        """Creates a client of Redis."""
        return redis.Redis.from_url(self.redis_url, client_name="bench")

    def measure_in_turn(
        self,
        part: str,
        title: str,
        unit: str,
        contenders: Mapping[str, Callable[[], float]],
        *,
        higher_is_better: bool = True,
        target: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Figure:
        """Measures every contender once per run, in turn, so that a change in the speed of the machine affects all.

        Args:
            part: as in `Figure`.
            title: as in `Figure`.
            unit: as in `Figure`.
            contenders: functions that each measure once and return the sample, by contender, ours first.
            higher_is_better: as in `Figure`.
            target: as in `Figure`.
            extra: as in `Figure`. It is not copied, so that contenders can add to it while they run.
        """
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        for run in range(1, self.runs + 1):
            for name, measure in contenders.items():
                with self._console.status(f"{part}: {title}, run {run} of {self.runs}: {name} …"):
                    samples[name].append(measure())
            numbers = ", ".join(f"{name} {format_number(values[-1])}" for name, values in samples.items())
            self._console.print(
                f"{part}: {title}, run {run} of {self.runs}, {unit}: {numbers}", highlight=False, soft_wrap=True
            )
        return Figure(part, title, unit, higher_is_better, samples, target, extra if extra is not None else {})

    def _inherited_environment(self) -> dict[str, str]:
        """Returns the environment of this process without the variables in `_EXCLUDED`."""
        return {name: value for name, value in os.environ.items() if not name.startswith(_EXCLUDED)}

    def _create_from(self, template: str) -> str:
        name = f"outbox_bench_{os.getpid()}_{next(self._ids)}"
        with self.connect_to_server() as connection:
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
            )
        return name

    def _drop(self, name: str) -> None:
        with self.connect_to_server() as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def connect_to_server(self) -> psycopg.Connection[Any]:
        """Opens a connection to the database in the URL of the server, in autocommit mode."""
        return psycopg.connect(self._server_url, autocommit=True, application_name="bench")

    def _url_of(self, name: str) -> str:
        return urlsplit(self._server_url)._replace(path=f"/{name}").geturl()


def format_number(value: float) -> str:
    """Returns a number for people to read: an integer from 100 on, else with three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@contextmanager
def open_bench(folder: Path, *, runs: int, smoke: bool, console: Console) -> Iterator[Bench]:
    """Opens a bench on the servers that BENCH_DATABASE_URL and BENCH_REDIS_URL name, or else on embedded ones.

    Embedded Postgres has its default settings, `fsync` included.

    Args:
        folder: an existing folder for data and logs.
        runs: number of runs of each contender.
        smoke: whether sizes are tiny.
        console: for progress messages.
    """
    folder.chmod(0o711)  # embedded Postgres may run as another user than this process
    with _postgres(folder) as server_url, _redis(folder) as redis_url:
        bench = Bench(server_url, redis_url, folder, runs=runs, smoke=smoke, console=console)
        try:
            yield bench
        finally:
            bench.close()


@contextmanager
def _postgres(folder: Path) -> Iterator[str]:
    if url := os.environ.get("BENCH_DATABASE_URL"):
        yield url
        return
    with embedded_postgres(folder / "postgres") as server:
        yield server.url


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    if url := os.environ.get("BENCH_REDIS_URL"):
        yield url
        return
    with embedded_redis(folder / "redis") as server:
        yield server.url
