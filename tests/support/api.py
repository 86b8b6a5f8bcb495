"""A service that runs in this process, its client, and assertions about its answers."""

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import httpx
import uvicorn

from outbox.runtime import logs
from outbox.runtime.settings import ServiceSettings
from outbox_service.server import create_server
from tests.conftest import Connection
from tests.support.waiting import eventually

PASSWORD = "hunter2 hunter2"


class Api:
    """A service on a real socket, with a client and its log."""

    def __init__(self, client: httpx.Client, port: int, log: StringIO, server: uvicorn.Server) -> None:
        self.client = client
        self.port = port
        self._log = log
        self._server = server

    @property
    def log(self) -> StringIO:
        """The log, including the lines of all answered requests: they are written after the answers."""
        deadline = time.monotonic() + 1
        while self._server.server_state.tasks and time.monotonic() < deadline:
            time.sleep(0.005)
        logs.flush()
        return self._log

    def create(self, name: str = "alice", path: str = "/v1/users", **changes: object) -> httpx.Response:
        """Posts a user that is valid except for the changes."""
        return self.client.post(path, json=user(name, **changes))

    def post(self, body: bytes | Iterator[bytes], content_type: str = "application/json") -> httpx.Response:
        """Posts any body."""
        return self.client.post("/v1/users", content=body, headers={"Content-Type": content_type})

    def events(self, event: str) -> list[dict[str, Any]]:
        """Returns the log lines of one event."""
        lines = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return [line for line in lines if line["event"] == event]


def user(name: str = "alice", **changes: object) -> dict[str, object]:
    """Returns a body that is valid except for the changes."""
    return {
        "username": name,
        "password": PASSWORD,
        "full_name": "Alice Liddell",
        "email": f"{name}@example.com",
        **changes,
    }


@contextmanager
def serve(settings: ServiceSettings) -> Iterator[Api]:
    """Runs the service in a thread of this process, with its log in memory."""
    server = create_server(settings)
    root = logging.getLogger()
    handlers, level, log = root.handlers, root.level, StringIO()
    with redirect_stdout(log):
        logs.configure("service", "info", "json")
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        eventually(lambda: server.started or not thread.is_alive(), 10, "the service starts")
        # Without TLS there is nothing to verify, and loading the certificates takes longer than most tests.
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, verify=False) as client:
            yield Api(client, port, log, server)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        root.handlers = handlers
        root.setLevel(level)
        logs.unconfigure()


def is_problem(response: httpx.Response, status: int) -> bool:
    """Returns whether a response is a problem (RFC 9457) with this status and the id of its request."""
    if response.status_code != status or response.headers["content-type"] != "application/problem+json":
        return False
    problem = response.json()
    return bool(
        {"type", "title", "status", "detail", "request_id"} <= problem.keys()
        and problem["status"] == status
        and problem["request_id"] == response.headers["x-request-id"]
        and problem["detail"] != ""
    )


def count_rows(connection: Connection) -> tuple[int, int]:
    """Returns the numbers of users and outbox rows."""
    row = connection.execute(
        "SELECT (SELECT count(*) FROM users) AS users, (SELECT count(*) FROM outbox) AS rows"
    ).fetchone()
    assert row is not None
    return row["users"], row["rows"]


def exchange(port: int, request: bytes) -> bytes:
    """Sends raw bytes on a new connection and returns everything received until it is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def send_half_body(port: int) -> None:
    """Sends a body that is shorter than its Content-Length, and disconnects."""
    head = b"POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head + json.dumps(user()).encode())
