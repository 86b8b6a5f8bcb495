"""The three processes, run as a user runs them: real processes with an environment and signals."""

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
"""Settings under which what is lost is found within a few seconds."""


def command_of(module: str) -> list[str]:
    """Returns the command that starts a process of ours, or a module."""
    return [sys.executable, "-m", *(["outbox"] if module in PROCESSES else []), module]


class Process:
    """One running process, its log and its end."""

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
        """Returns all that it has printed."""
        return self.log.read_text(errors="replace")

    def events(self, event: str) -> list[dict[str, Any]]:
        """Returns its log lines of one event."""
        lines = [json.loads(line) for line in self.text().splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in lines if line.get("event") == event]

    def await_event(self, event: str, seconds: float = 20) -> dict[str, Any]:
        """Waits until it logs an event and returns the first."""
        eventually(lambda: self.events(event) or self.popen.poll() is not None, seconds, f"{event!r} of {self.module}")
        found = self.events(event)
        assert found, f"{self.module} ended with {self.popen.returncode}:\n{self.text()}"
        return found[0]

    def is_up(self) -> bool:
        """Whether it still runs."""
        return self.popen.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self.popen.send_signal(number)

    def wait(self, seconds: float = 30) -> int:
        """Waits for its end and returns the exit code."""
        return self.popen.wait(seconds)

    def stop(self) -> int:
        """Ends it as an operator would: SIGTERM."""
        if self.popen.poll() is None:
            self.send(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Ends it whatever it does."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()


class Stack:
    """Any number of services, relays and workers on one database, Redis and mailbox. Ends all that it started."""

    measured = True
    """Whether the processes measure their coverage, which makes each start and each row dearer."""

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
        """Where the API is."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, module: str, *, limits: str = "", **environment: str) -> Process:
        """Starts `python -m module`, behind a command of the shell that sets limits, without waiting for it."""
        log = self.folder / f"{module}-{len(self.processes)}.log"
        process = Process(module, {**self.environment, **environment}, log, measured=self.measured, limits=limits)
        self.processes.append(process)
        return process

    def run(self, module: str, *, limits: str = "", **environment: str) -> Process:
        """Starts a process and waits until it says that it has started (the service: until it answers)."""
        process = self.start(module, limits=limits, **environment)
        process.await_event("started")
        if module == "service":
            eventually(lambda: self.get("/healthz")[0] == 200, 20, "the service answers")
        return process

    def run_all(self, *modules: str, **environment: str) -> list[Process]:
        """Starts processes at once and waits until all have started."""
        processes = [self.start(module, **environment) for module in modules]
        for process in processes:
            process.await_event("started", 40)
            if process.module == "service":
                eventually(lambda: self.get("/healthz")[0] == 200, 20, "the service answers")
        return processes

    def create_user(self, name: str, **headers: str) -> tuple[int, dict[str, Any]]:
        """Creates a user and returns the status and the answer."""
        user = {
            "username": name,
            "password": "correct horse",
            "full_name": "A Test User",
            "email": f"{name}@example.com",
        }
        return self.post("/v1/users", user, **headers)

    def post(self, path: str, body: object, **headers: str) -> tuple[int, dict[str, Any]]:
        """Posts JSON."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        )
        return _answer(request)

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, Any]]:
        """Gets JSON."""
        return _answer(urllib.request.Request(self.url + path, headers={"Accept": "application/json", **headers}))

    def close(self) -> None:
        """Kills whatever still runs."""
        for process in self.processes:
            process.kill()


def take_down(server: EmbeddedServer) -> None:
    """Stops an embedded server at once, as an operator or a crash would; `server.restart()` brings it back."""
    server.process.send_signal(signal.SIGINT if server.name == "postgres" else signal.SIGTERM)
    server.process.wait(30)


@contextmanager
def frozen(server: EmbeddedServer) -> Iterator[None]:
    """Stops a server and its children in their tracks: connections stay open, and nothing answers."""
    main = psutil.Process(server.process.pid)
    main.suspend()  # first, and until it has stopped: what it starts while its children are listed would go on
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
    """Creates users and their outbox rows as the service does, but many at once and by SQL alone.

    Args:
        connection: in autocommit mode.
        names: their usernames; a user's address is name@example.com.
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
    """Returns status and JSON; status 0 where there was no answer."""
    try:
        with urllib.request.urlopen(request, timeout=15) as response:
            return response.status, json.loads(response.read() or b"{}")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"{}")
    except OSError:
        return 0, {}


def _clean_environment(*, measured: bool) -> dict[str, str]:
    """Returns this environment without what configures the processes, and without the tests' own servers."""
    ours = ("OUTBOX_", "DATABASE_URL", "REDIS_URL", "SMTP_", "MAIL_", "HTTP_SERVER", "PUBLIC_URL", "VERIFY_", "LOG_")
    left_out = (*ours, "SECRET_KEY", "TEST_", *(() if measured else ("COVERAGE_",)))
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
