"""The stage that a part works on: servers, empty databases, processes, and the loop that measures in turn."""

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

from bench.measure import Figure
from bench.process import Process
from outbox.devstack.embedded import embedded_postgres, embedded_redis
from outbox.runtime.migrations import migrate

_OURS = ("OUTBOX_", "DATABASE_URL", "REDIS_URL", "SMTP_", "MAIL_", "HTTP_SERVER", "PUBLIC_URL", "VERIFY_", "LOG_")
_PEER_LIMIT = 180.0
"""Seconds that a peer's program may take."""


class Bench:
    """What a part has to work with."""

    def __init__(
        self, server_url: str, redis_url: str, folder: Path, *, runs: int, smoke: bool, console: Console
    ) -> None:
        self.database_url = server_url
        """The newest database that `fresh` has made."""
        self.redis_url = redis_url
        self.folder = folder
        """For logs and whatever else a part has to write."""
        self.runs = runs
        """How often each contender is measured."""
        self.smoke = smoke
        """Whether this run only shows that everything works."""
        self._console = console
        self._server_url = server_url
        self._numbers = count(1)
        self._template: str | None = None
        self._databases: list[str] = []
        self._fresh: str | None = None

    def size(self, full: int, smoke: int) -> int:
        """Returns how many there are to be: the first in a real run, the second in a smoke run."""
        return smoke if self.smoke else full

    def fresh(self) -> None:
        """Empties Redis, and replaces the database by an empty, migrated one under a new name and URL.

        Whoever works on the one before must have ended: it is dropped.
        """
        self.empty_redis()
        if self._fresh:
            self._databases.remove(self._fresh)
            self._drop(self._fresh)
        if self._template is None:
            self._template = self._create("template1")
            migrate(self._url_of(self._template))
        self._fresh = self._create(self._template)
        self._databases.append(self._fresh)
        self.database_url = self._url_of(self._fresh)

    def database(self) -> str:
        """Returns the URL of a new, empty database, which is there until the part ends."""
        name = self._create("template1")
        self._databases.append(name)
        return self._url_of(name)

    def clear(self) -> None:
        """Drops the databases and empties Redis: the part has ended."""
        while self._databases:
            self._drop(self._databases.pop())
        self._fresh = None
        self.empty_redis()

    def close(self) -> None:
        """Leaves nothing behind on the servers."""
        self.clear()
        if self._template:
            self._drop(self._template)
            self._template = None

    def empty_redis(self) -> None:
        """Empties Redis."""
        with self.client() as client:
            client.flushall()

    def environment(self, **more: str) -> dict[str, str]:
        """Returns the whole environment for one of our processes, quiet about what goes well.

        Args:
            more: goes along, and wins.
        """
        return {
            **self._inherited(),
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.redis_url,
            "SMTP_URL": "smtp://127.0.0.1:1",  # nobody listens there; a part with mails has a server of its own
            "MAIL_FROM": "Sign-up <no-reply@example.com>",
            "PUBLIC_URL": "https://example.com",
            "SECRET_KEY": "a secret key for the bench, 32 characters or more",
            "VERIFY_EMAIL_DELAY": "0",
            "LOG_LEVEL": "warning",
            "LOG_FORMAT": "json",
            **more,
        }

    def start(self, module: str, **env: str) -> Process:
        """Starts `python -m module` without waiting for it; a context manager that ends it.

        Args:
            module: `relay`, `worker` or `service`.
            env: what its environment has besides `environment()`.
        """
        log = self.folder / f"{module}-{next(self._numbers)}.log"
        return Process(module, self.environment(**env), log, measured=False)

    def peer(self, module: str, *arguments: object) -> float:
        """Runs `python -m bench.peers.module` to its end and returns the number in its last line.

        Args:
            module: the program's name.
            arguments: its command line.

        Raises:
            RuntimeError: it failed; with what it has printed.
        """
        command = [sys.executable, "-m", f"bench.peers.{module}", *map(str, arguments)]
        done = subprocess.run(  # noqa: S603 - our own programs
            command, env=self._inherited(), capture_output=True, text=True, timeout=_PEER_LIMIT, check=False
        )
        lines = done.stdout.split()
        if done.returncode != 0 or not lines:
            raise RuntimeError(f"the peer {module} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return float(lines[-1])

    def connect(self) -> psycopg.Connection[Any]:
        """Opens a connection to the fresh database, in autocommit mode."""
        return psycopg.connect(self.database_url, autocommit=True, application_name="bench")

    def client(self) -> redis.Redis:
        """Makes a client of Redis."""
        return redis.Redis.from_url(self.redis_url, client_name="bench")

    def in_turn(
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
        """Measures every contender once per run, one after the other, so that a drifting machine hurts all alike.

        Args:
            part: as in `Figure`, like the following.
            title: …
            unit: …
            contenders: by name, ours first; each does all of one run and returns its number.
            higher_is_better: …
            target: …
            extra: kept as it is, not copied: what the contenders add to it later is there too.
        """
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        for run in range(1, self.runs + 1):
            for name, measure in contenders.items():
                with self._console.status(f"{part}: {title}, run {run} of {self.runs}: {name} …"):
                    samples[name].append(measure())
            numbers = ", ".join(f"{name} {shown(values[-1])}" for name, values in samples.items())
            self._console.print(
                f"{part}: {title}, run {run} of {self.runs}, {unit}: {numbers}", highlight=False, soft_wrap=True
            )
        return Figure(part, title, unit, higher_is_better, samples, target, extra if extra is not None else {})

    def _inherited(self) -> dict[str, str]:
        """Returns this environment without what configures our processes."""
        left_out = (*_OURS, "SECRET_KEY", "BENCH_", "COVERAGE_", "PGQUEUER_", "PROCRASTINATE_", "RQ_")
        return {name: value for name, value in os.environ.items() if not name.startswith(left_out)}

    def _create(self, template: str) -> str:
        name = f"outbox_bench_{os.getpid()}_{next(self._numbers)}"
        with self.server() as connection:
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
            )
        return name

    def _drop(self, name: str) -> None:
        with self.server() as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def server(self) -> psycopg.Connection[Any]:
        """Opens a connection to the server itself, in autocommit mode."""
        return psycopg.connect(self._server_url, autocommit=True, application_name="bench")

    def _url_of(self, name: str) -> str:
        return urlsplit(self._server_url)._replace(path=f"/{name}").geturl()


def shown(value: float) -> str:
    """Returns a number as people read it: three digits or more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@contextmanager
def open_bench(folder: Path, *, runs: int, smoke: bool, console: Console) -> Iterator[Bench]:
    """Makes a stage on the servers that BENCH_DATABASE_URL and BENCH_REDIS_URL name, else on embedded ones.

    Both servers keep the settings they have; embedded Postgres has its defaults, `fsync` among them.

    Args:
        folder: an existing folder for data and logs.
        runs: how often each contender is measured.
        smoke: whether sizes are tiny.
        console: where progress goes.
    """
    folder.chmod(0o711)  # embedded Postgres may have to run as another user than this process
    with _postgres(folder) as server_url, _redis(folder) as redis_url:
        bench = Bench(server_url, redis_url, folder, runs=runs, smoke=smoke, console=console)
        try:
            yield bench
        finally:
            bench.close()


@contextmanager
def _postgres(folder: Path) -> Iterator[str]:
    if given := os.environ.get("BENCH_DATABASE_URL"):
        yield given
        return
    with embedded_postgres(folder / "postgres") as server:
        yield server.url


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    if given := os.environ.get("BENCH_REDIS_URL"):
        yield given
        return
    with embedded_redis(folder / "redis") as server:
        yield server.url
