"""The headers of every answer, whether the application, the middleware, the protocol or the server writes it."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import parse_headers
from io import BytesIO
from typing import Any

import pytest

from outbox.runtime.settings import ServiceSettings
from outbox_service import http_protocol, server
from tests.conftest import Connection
from tests.support.api import Api, exchange, serve, user
from tests.support.waiting import eventually

SAFE = {
    "cache-control": ["no-store"],
    "x-content-type-options": ["nosniff"],
    "referrer-policy": ["no-referrer"],
    "x-frame-options": ["DENY"],
}
POST = b"POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LINK = "/v1/verify_email?email_id=1&secret_code=abc"
BROWSER, JSON = {"Accept": "text/html"}, {"Accept": "application/json"}


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service with a database of its own."""
    with serve(service_settings) as served:
        yield served


def parse(answer: bytes) -> tuple[int, dict[str, list[str]]]:
    """Returns the status of an answer and its headers that SAFE names."""
    head, _, rest = answer.partition(b"\r\n")
    headers = parse_headers(BytesIO(rest))
    return int(head.split(b" ")[1]), {name: headers.get_all(name, []) for name in SAFE}


def test_every_answer_of_the_application_is_safe(api: Api, connection: Connection) -> None:
    """Pages, probes, documentation, users and problems: none may be cached, sniffed, framed or sent as a referrer."""
    request, post = api.client.request, api.post
    answers = [
        (200, request("GET", "/healthz")),
        (200, request("GET", "/readyz")),
        (200, request("GET", "/schema")),
        (200, request("GET", "/schema/openapi.json")),
        (201, api.create()),
        (204, request("OPTIONS", "/v1/users")),
        (400, api.create("x")),
        (400, post(b"{")),
        (400, request("GET", LINK, headers=BROWSER)),
        (400, request("POST", LINK, headers=BROWSER)),
        (400, request("GET", LINK, headers=JSON)),
        (400, request("GET", "/v1/verify_email", headers=JSON)),
        (404, request("GET", "/nope")),
        (404, request("GET", "/schema/nope")),
        (404, request("GET", LINK.replace("?", "%3F"))),
        (405, request("GET", "/v1/users")),
        (405, request("PUT", LINK)),
        (405, request("HEAD", "/healthz")),
        (409, api.create()),
        (413, post(b" " * 70_000)),
        (415, post(b"<a/>", "text/xml")),
    ]
    connection.execute("ALTER TABLE outbox DROP COLUMN request_id")
    answers.append((500, api.create("bob")))
    connection.execute("ALTER TABLE users RENAME TO gone")
    answers.append((503, api.create("carol")))
    answers.append((503, request("GET", LINK, headers=BROWSER)))

    for status, answer in answers:
        failed = (answer.request.method, answer.request.url.path, answer.status_code)
        assert answer.status_code == status, failed
        assert {name: answer.headers.get_list(name) for name in SAFE} == SAFE, failed


REFUSED = {
    "garbage": (400, b"\xff\r\n\r\n"),
    "two lengths": (400, b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"),
    "half a head": (408, b"GET /healthz HTTP/1.1\r\n"),
    "half a body": (408, POST + b"Content-Length: 9\r\n\r\n"),
    "many lines": (431, b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * 300 + b"\r\n"),
    "another coding": (501, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n"),
    "another version": (505, b"GET / HTTP/2.0\r\nHost: x\r\n\r\n"),
}


@pytest.mark.parametrize(("status", "request_"), REFUSED.values(), ids=REFUSED)
def test_every_answer_of_the_protocol_is_safe(
    service_settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch, status: int, request_: bytes
) -> None:
    """The answer to malformed or late requests has the same headers."""
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT", 0.2)
    monkeypatch.setattr(http_protocol, "BODY_TIMEOUT", 0.2)
    with serve(service_settings) as api:
        assert parse(exchange(api.port, request_)) == (status, SAFE)


def test_the_answers_of_a_full_or_stopping_service_are_safe(
    service_settings: ServiceSettings, connection: Connection
) -> None:
    """A connection over the limit and a request cut off by the stop get 503 with the same headers."""
    body = json.dumps(user()).encode()
    connection.execute("BEGIN")
    connection.execute("LOCK TABLE users")
    waiting = "SELECT FROM pg_locks WHERE relation = 'users'::regclass AND NOT granted"
    with ExitStack() as stack:
        with serve(service_settings.model_copy(update={"http_connections": 1, "grace": 0.1})) as api:
            busy = stack.enter_context(socket.create_connection(("127.0.0.1", api.port), timeout=20))
            busy.sendall(POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            eventually(lambda: connection.execute(waiting).fetchall(), 10, "the request waits for the lock")
            assert parse(exchange(api.port, b"")) == (503, SAFE)
        assert parse(busy.recv(65_536)) == (503, SAFE)


def test_the_answer_for_a_broken_application_is_safe(
    service_settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 500 that uvicorn writes has the same headers."""

    async def broken(scope: dict[str, Any], *_: object) -> None:
        if scope["type"] == "http":
            raise RuntimeError("broken")

    monkeypatch.setattr(server, "create_app", lambda *_: broken)
    with serve(service_settings) as api:
        assert parse(exchange(api.port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")) == (500, SAFE)
