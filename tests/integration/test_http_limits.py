"""Limits on a client's time, on the size of a head, and on the number of connections."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import repeat

import httpx
import psutil
import pytest

from outbox.runtime.settings import ServiceSettings
from outbox.runtime.tally import Tally
from outbox_service import http_protocol
from tests.conftest import Connection
from tests.support.api import Api, is_problem, serve, user
from tests.support.waiting import eventually

LINE = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/users HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
BODY_LESS = POST + b"Content-Length: 9\r\n\r\n{"


def post(content: object) -> bytes:
    """Returns a request with a JSON body."""
    body = json.dumps(content).encode()
    return POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.fixture
def api(service_settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """A service that waits half a second for a client and accepts ten connections."""
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT", 0.5)
    monkeypatch.setattr(http_protocol, "BODY_TIMEOUT", 0.5)
    monkeypatch.setattr(http_protocol, "_tally", Tally())  # one log line a minute, independent of earlier tests
    with serve(service_settings.model_copy(update={"http_connections": 10})) as served:
        yield served


def connect(port: int) -> socket.socket:
    """Opens a connection."""
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def read_all(connection: socket.socket) -> bytes:
    """Returns everything received until the service closes the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            received += part
    return received


@contextmanager
def hold_connections(port: int, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """Holds connections on which these bytes were sent."""
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(port)) for _ in range(count)]
        for connection in connections:
            connection.sendall(sent)
        yield connections


@pytest.mark.parametrize(
    "part", [b"X: " + b"x" * 1000 + b"\r\n", b"x" * 10_000], ids=["endless lines", "an endless line"]
)
def test_a_head_without_end_is_refused(api: Api, part: bytes) -> None:
    """At 64 KiB the service stops reading and logs it, and it serves other clients throughout."""
    sent = 0
    with connect(api.port) as connection:
        connection.sendall(LINE + b"X: ")
        with suppress(ConnectionError):
            for piece in repeat(part, 30_000_000 // len(part)):
                connection.sendall(piece)
                sent += len(piece)
                if sent % (len(part) * 50) == 0:
                    assert api.client.get("/healthz").status_code == 200
    assert sent < 10_000_000
    assert [line["why"] for line in api.events("refused an HTTP request")] == [
        "not a valid HTTP request: the head is over 64 KiB"
    ]


def test_a_head_of_64_kib_is_read(api: Api) -> None:
    """A head just under the limit is served; one just over it is a 431."""
    assert api.client.get("/healthz", headers={"X": "x" * 60_000}).status_code == 200
    assert is_problem(api.client.get("/healthz", headers={"X": "x" * 66_000}), 431)


COSTLY = {
    "many lines": LINE + b"a:\r\n" * 16_000 + b"\r\n",
    "many chunks": POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 60_000 + b"0\r\n\r\n",
    "many fields": post({f"{n:x}": 0 for n in range(5_500)}),
    "a long field": post({"x" * 60_000: 0}),
}
"""Small requests that kept the event loop busy for 40 to 1,000 ms each, or got a larger answer."""


@pytest.mark.parametrize("request_", COSTLY.values(), ids=COSTLY)
def test_a_small_request_costs_little(api: Api, request_: bytes) -> None:
    """It is refused with a short answer before most of it is parsed."""
    began = time.process_time()
    with connect(api.port) as connection:
        with suppress(ConnectionError):
            connection.sendall(request_)
        answer = read_all(connection)
    assert time.process_time() - began < 0.8
    assert answer.split(b" ")[1] in (b"400", b"413", b"431") or not answer
    assert len(answer) < 2000
    assert api.client.get("/healthz").status_code == 200


@pytest.mark.parametrize("parts", [1, 3])
def test_many_trailers_are_refused(api: Api, parts: int) -> None:
    """Lines after the last chunk cost as much as those of a head, and no real client sends any."""
    trailers = b"a:\r\n" * (15_000 // parts)
    with connect(api.port) as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n \r\n0\r\n")
        with suppress(ConnectionError):
            for _ in range(parts):
                connection.sendall(trailers)
                time.sleep(0.05)
            connection.sendall(b"\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("sent", [b"G", LINE, BODY_LESS], ids=["a byte", "half a head", "half a body"])
def test_half_a_request_times_out(api: Api, sent: bytes) -> None:
    """It gets 408 and its connection is closed; many of them are logged once."""
    with hold_connections(api.port, 5, sent) as connections:
        answers = [read_all(connection) for connection in connections]

    assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers)
    (line,) = api.events("refused an HTTP request")
    assert "did not arrive within 0.5 s" in line["why"]


def test_a_slow_request_times_out(api: Api) -> None:
    """The limit is for the whole head: a byte now and then does not restart it."""
    began = time.monotonic()
    with connect(api.port) as connection, suppress(ConnectionError):
        connection.settimeout(0.05)
        while time.monotonic() < began + 10:
            connection.sendall(b"G")
            with suppress(TimeoutError):
                assert connection.recv(12) == b"HTTP/1.1 408"
                break
    assert time.monotonic() < began + 5


def test_an_idle_connection_is_closed_without_an_answer(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client would take an answer for that to its next request."""
    monkeypatch.setattr(http_protocol, "IDLE_TIMEOUT", 0.2)
    with connect(api.port) as silent, connect(api.port) as served:
        served.sendall(LINE + b"\r\n")
        assert read_all(silent) == b""
        assert read_all(served).count(b"HTTP/1.1 ") == 1
    assert not api.events("refused an HTTP request")


@pytest.mark.parametrize("sent", [b"", LINE, BODY_LESS], ids=["nothing", "half a head", "half a body"])
def test_many_that_send_nothing_keep_nobody_out(api: Api, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit, the connection that has waited longest for its client is closed for a new one."""
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT", 60)
    monkeypatch.setattr(http_protocol, "BODY_TIMEOUT", 60)
    with hold_connections(api.port, 30, sent) as connections:
        for _ in range(5):
            with httpx.Client(base_url=f"http://127.0.0.1:{api.port}", verify=False) as client:
                assert client.get("/healthz").status_code == 200
        assert all(read_all(connection) == b"" for connection in connections[:20])
    assert len(api.events("too many connections")) == 1


def test_a_connection_in_use_is_not_closed_for_a_new_one(api: Api, connection: Connection) -> None:
    """If all connections are in use, a further one gets 503, and the others get their answers."""
    with ExitStack() as stack:
        connection.execute("BEGIN")
        connection.execute("LOCK TABLE users")
        busy = [stack.enter_context(connect(api.port)) for _ in range(10)]
        for number, one in enumerate(busy):
            one.sendall(post(user(f"user_{number}")))
        waiting = "SELECT FROM pg_locks WHERE relation = 'users'::regclass AND NOT granted"
        eventually(lambda: connection.execute(waiting).fetchall(), 10, "the requests wait for the lock")
        with connect(api.port) as further:
            assert read_all(further).startswith(b"HTTP/1.1 503 ")
        connection.execute("ROLLBACK")
        assert [read_all(one)[:12] for one in busy] == [b"HTTP/1.1 201"] * 10


ANSWERS_UNREAD = 400
"""Pipelined answers of 13 KB: more than the buffers of both ends hold."""


@contextmanager
def hold_unread(port: int, count: int, last: bytes = b"") -> Iterator[list[socket.socket]]:
    """Holds connections that request much and read nothing."""
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.socket()) for _ in range(count)]
        for connection in connections:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect(("127.0.0.1", port))
            connection.sendall(b"GET /schema/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * ANSWERS_UNREAD + last)
        yield connections


def is_held(port: int) -> bool:
    """Returns whether the service, which runs in this process, holds a connection. Reading from it would release it."""
    held = psutil.Process().net_connections("tcp")
    return any(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == port for one in held)


@pytest.mark.parametrize("last", [b"", b"nonsense\r\n\r\n"], ids=["only requests", "nonsense at the end"])
def test_a_client_that_reads_no_answers_times_out(api: Api, last: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its buffers are full, its connection is closed after READ_TIMEOUT."""
    monkeypatch.setattr(http_protocol, "READ_TIMEOUT", 0.5)
    with hold_unread(api.port, 1, last):
        eventually(lambda: is_held(api.port), 5, "it is accepted")
        eventually(lambda: not is_held(api.port), 20, "it is closed")


def test_clients_that_read_no_answers_keep_nobody_out(service_settings: ServiceSettings) -> None:
    """Their connections are closed for new ones before the time is over."""
    with serve(service_settings.model_copy(update={"http_connections": 2})) as api, hold_unread(api.port, 2):
        eventually(lambda: _is_served(api.port), 15, "another client gets its answer")


def _is_served(port: int) -> bool:
    with connect(port) as connection:
        connection.sendall(LINE + b"Connection: close\r\n\r\n")
        return read_all(connection).startswith(b"HTTP/1.1 200 ")
