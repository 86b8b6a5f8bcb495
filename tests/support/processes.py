"""Runs the three processes as a user does: as real processes, controlled by their environment and signals."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg

from outbox.devstack.embedded import EmbeddedServer
from outbox.runtime.process import PROCESSES
from tests.support.mailbox import free_port
from tests.support.waiting import eventually

SECRET_KEY = "a secret key for tests, 32 characters or more"

QUICK = {
    "OUTBOX_POLL_INTERVAL": "0.2",
    "OUTBOX_SWEEP_INTERVAL": "0.5",
    "OUTBOX_SWEEP_GRACE": "1",
    "OUTBOX_LEASE": "2",
}
"""Settings with which the relay recovers lost rows within a few seconds."""


def command_of(module: str) -> list[str]:
    """Returns the command that starts one of the three processes, or else a module."""
    return [sys.executable, "-m", *(["outbox"] if module in PROCESSES else []), module]


class Process:
    """A process and its log."""

    def __init__(
        self,
        module: str,
        environment: Mapping[str, str],
        log: Path,
        *,
        measured: bool = True,
        limits: str = "",
    ) -> None:
        self.module = module
        self.log = log
        limited = ["sh", "-c", f'{limits} && exec "$@"', "sh"] if limits else []
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                [*limited, *command_of(module)],
                env={**_clean_environment(measured=measured), "LOG_FORMAT": "json", **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        """Returns its whole output."""
        return self.log.read_text(errors="replace")

    def events(self, event: str) -> list[dict[str, Any]]:
        """Returns its log lines of one event."""
        lines = [json.loads(line) for line in self.text().splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in lines if line.get("event") == event]

    def await_event(self, event: str, seconds: float = 20) -> dict[str, Any]:
        """Waits until it logs an event, and returns the first such line."""
        eventually(lambda: self.events(event) or self.popen.poll() is not None, seconds, f"{event!r} of {self.module}")
        lines = self.events(event)
        assert lines, f"{self.module} exited with {self.popen.returncode}:\n{self.text()}"
        return lines[0]

    def is_up(self) -> bool:
        """Whether it is running."""
        return self.popen.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self.popen.send_signal(number)

    def wait(self, seconds: float = 30) -> int:
        """Waits for its exit, and returns the exit code."""
        return self.popen.wait(seconds)

    def stop(self) -> int:
        """Stops it by SIGTERM, and returns the exit code."""
        if self.popen.poll() is None:
            self.send(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Kills it if it is running."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()


class Stack:
    """Any number of services, relays and workers on one database, Redis and mailbox."""

    measured = True
    """Whether the processes measure their coverage, which slows down each start and each row."""

    def __init__(self, folder: Path, database_url: str, redis_url: str, smtp_url: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.environment = {
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "SMTP_URL": smtp_url,
            "MAIL_FROM": "Sign-up <no-reply@example.com>",
            "PUBLIC_URL": self.url,
            "SECRET_KEY": SECRET_KEY,
            "HTTP_SERVER_ADDRESS": f"127.0.0.1:{self.port}",
            "VERIFY_EMAIL_DELAY": "0",
        }
        self.processes: list[Process] = []

    @property
    def url(self) -> str:
        """The URL of the API."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, module: str, *, limits: str = "", **environment: str) -> Process:
        """Starts a process without waiting for it; `limits` is a shell command to run before, such as `ulimit`."""
        log = self.folder / f"{module}-{len(self.processes)}.log"
        process = Process(module, {**self.environment, **environment}, log, measured=self.measured, limits=limits)
        self.processes.append(process)
        return process

    def run(self, module: str, *, limits: str = "", **environment: str) -> Process:
        """Starts a process, and waits until it logs that it started; a service must also answer."""
        process = self.start(module, limits=limits, **environment)
        process.await_event("started")
        if module == "service":
            eventually(lambda: self.get("/healthz")[0] == 200, 20, "the service answers")
        return process

    def run_all(self, *modules: str, **environment: str) -> list[Process]:
        """Starts processes at the same time, and waits for all of them."""
        processes = [self.start(module, **environment) for module in modules]
        for process in processes:
            process.await_event("started", 40)
            if process.module == "service":
                eventually(lambda: self.get("/healthz")[0] == 200, 20, "the service answers")
        return processes

    def create_user(self, name: str, **headers: str) -> tuple[int, dict[str, Any]]:
        """Creates a user, and returns the status and the answer."""
        user = {
            "username": name,
            "password": "correct horse",
            "full_name": "A Test User",
            "email": f"{name}@example.com",
        }
        return self.post("/v1/users", user, **headers)

    def post(self, path: str, body: object, **headers: str) -> tuple[int, dict[str, Any]]:
        """Sends a POST request with JSON, and returns the status and the answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        )
        return _answer(request)

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, Any]]:
        """Sends a GET request, and returns the status and the answer."""
        return _answer(urllib.request.Request(self.url + path, headers={"Accept": "application/json", **headers}))

    def close(self) -> None:
        """Kills all processes that are running."""
        for process in self.processes:
            process.kill()


def take_down(server: EmbeddedServer) -> None:
    """Stops an embedded server and waits for its exit; `server.restart()` starts it again."""
    server.process.send_signal(signal.SIGINT if server.name == "postgres" else signal.SIGTERM)
    server.process.wait(30)


@contextmanager
def frozen(server: EmbeddedServer) -> Iterator[None]:
    """Suspends a server and its children during the block: connections stay open, and nothing answers."""
    main = psutil.Process(server.process.pid)
    main.suspend()  # before its children are listed: a child that it starts after that would keep running
    eventually(lambda: main.status() == psutil.STATUS_STOPPED, 5, "it has stopped")
    processes = [main, *main.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def add_users(connection: psycopg.Connection[Any], names: list[str], *, delay: float = 0) -> None:
    """Creates users and their outbox rows by SQL, in one transaction.

    Args:
        connection: a connection in autocommit mode.
        names: their usernames; each address is name@example.com.
        delay: seconds until their mails are due.
    """
    with connection.transaction():
        connection.execute(
            "INSERT INTO users (username, hashed_password, full_name, email) "
            "SELECT name, 'none', 'A Test User', name || '@example.com' FROM unnest(%s::text[]) AS name",
            [names],
        )
        connection.execute(
            "INSERT INTO outbox (task, payload, queue, max_retries, timeout, run_at) "
            "SELECT 'send_verify_email', jsonb_build_object('username', name), 'critical', 10, 30, "
            "now() + make_interval(secs => %s) FROM unnest(%s::text[]) AS name",
            [delay, names],
        )


def _answer(request: urllib.request.Request) -> tuple[int, dict[str, Any]]:
    """Returns the status and the JSON answer; status 0 if there was no answer."""
    try:
        with urllib.request.urlopen(request, timeout=15) as response:
            return response.status, json.loads(response.read() or b"{}")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"{}")
    except OSError:
        return 0, {}


def _clean_environment(*, measured: bool) -> dict[str, str]:
    """Returns this environment without the settings of the processes and of the tests."""
    ours = ("OUTBOX_", "DATABASE_URL", "REDIS_URL", "SMTP_", "MAIL_", "HTTP_SERVER", "PUBLIC_URL", "VERIFY_", "LOG_")
    left_out = (*ours, "SECRET_KEY", "TEST_", *(() if measured else ("COVERAGE_",)))
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
