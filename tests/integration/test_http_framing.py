"""Where one request ends and the next begins, so that no client gets another's answer."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from outbox.runtime.settings import ServiceSettings
from tests.conftest import Connection
from tests.support.api import Api, serve, user

BODY = json.dumps(user()).encode()
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service with a database of its own."""
    with serve(service_settings) as served:
        yield served


def exchange(port: int, *parts: bytes) -> list[int]:
    """Sends bytes on one connection and returns the status of each answer until the service closes it."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"".join(parts))
        received = b""
        with suppress(ConnectionResetError):
            while part := connection.recv(65_536):
                received += part
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def sign_up(*headers: bytes, body: bytes = BODY, version: bytes = b"1.1") -> bytes:
    """Returns a request that creates a user, with these header lines."""
    lines = [b"POST /v1/users HTTP/" + version, b"Content-Type: application/json", *headers, b"", body]
    return b"\r\n".join(lines)


EMPTY = sign_up(b"Host: x", b"Content-Length: 0", body=b"")
LENGTH = b"Content-Length: %d" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket", b"TLS/1.0", b"h2c, websocket"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_body_behind_an_offered_upgrade_is_read(
    api: Api, connection: Connection, upgrade: bytes, framing: str
) -> None:
    """The upgrade is ignored, and the bytes after the body are the next request."""
    offer = (b"Host: x", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: " + upgrade, b"HTTP2-Settings: AAMAAABk")
    request = sign_up(*offer, LENGTH) if framing == "length" else sign_up(*offer, CHUNKED, body=CHUNKS)

    assert exchange(api.port, request, LAST) == [201, 200]
    assert connection.execute("SELECT username FROM users").fetchall() == [{"username": "alice"}]


REFUSED = {
    "a length and chunks": sign_up(b"Host: x", LENGTH, CHUNKED, body=CHUNKS),
    "chunks and a length": sign_up(b"Host: x", CHUNKED, LENGTH, body=CHUNKS),
    "a length of 0 and chunks": sign_up(b"Host: x", b"Content-Length: 0", CHUNKED, body=CHUNKS),
    "two lengths": sign_up(b"Host: x", LENGTH, b"Content-Length: 1"),
    "two lengths in a line": sign_up(b"Host: x", LENGTH + b", 1"),
    "a negative length": sign_up(b"Host: x", b"Content-Length: -1"),
    "a signed length": sign_up(b"Host: x", b"Content-Length: +%d" % len(BODY)),
    "a hexadecimal length": sign_up(b"Host: x", b"Content-Length: 0x10"),
    "no length": sign_up(b"Host: x", b"Content-Length:"),
    "a folded header": sign_up(b"Host: x", b"X-Folded: a\r\n b", LENGTH),
    "a folded length": sign_up(b"Host: x", b"Content-Length:\r\n %d" % len(BODY)),
    "folded chunks": sign_up(b"Host: x", b"Transfer-Encoding:\r\n chunked", body=CHUNKS),
    "a space before the colon": sign_up(b"Host: x", b"Content-Length : %d" % len(BODY)),
    "chunks behind a control character": sign_up(b"Host: x", b"Transfer-Encoding: \x0bchunked", body=CHUNKS),
    "chunks with another coding": sign_up(b"Host: x", b"Transfer-Encoding: gzip, chunked", body=CHUNKS),
    "another coding": sign_up(b"Host: x", b"Transfer-Encoding: gzip", body=CHUNKS),
    "chunks twice": sign_up(b"Host: x", b"Transfer-Encoding: chunked, chunked", body=CHUNKS),
    "chunks in two lines": sign_up(b"Host: x", CHUNKED, CHUNKED, body=CHUNKS),
    "chunks in HTTP/1.0": sign_up(b"Host: x", CHUNKED, body=CHUNKS, version=b"1.0"),
    "no host": sign_up(LENGTH),
    "two hosts": sign_up(b"Host: x", b"Host: y", LENGTH),
    "bare LF": sign_up(b"Host: x", LENGTH).replace(b"\r\n", b"\n"),
    "bare LF within a line": sign_up(b"Host: x", b"X: a\n" + CHUNKED, LENGTH),
    "bare LF at the end of the head": sign_up(b"Host: x", LENGTH).replace(b"\r\n\r\n", b"\r\n\n"),
    "bare CR": sign_up(b"Host: x", b"X: a\r" + CHUNKED, LENGTH),
    "a null": sign_up(b"Host: x", b"X: a\0b", LENGTH),
    "a chunk's length with a sign": sign_up(b"Host: x", CHUNKED, body=b"+" + CHUNKS),
    "a chunk's length with 0x": sign_up(b"Host: x", CHUNKED, body=b"0x" + CHUNKS),
    "a chunk that is longer than it says": sign_up(b"Host: x", CHUNKED, body=b"2\r\n{}{}\r\n0\r\n\r\n"),
    "chunks with bare LF": sign_up(b"Host: x", CHUNKED, body=CHUNKS.replace(b"\r\n", b"\n")),
    "a bad chunk behind HEAD": b"HEAD /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
    "no request line": b"\r\n\r\n\r\n",
    "garbage": b"\xff" * 1000,
}


@pytest.mark.parametrize("request_", REFUSED.values(), ids=REFUSED)
def test_what_two_servers_may_read_differently_is_refused(api: Api, connection: Connection, request_: bytes) -> None:
    """It gets one error, the connection is closed, and nothing after it is parsed."""
    statuses = exchange(api.port, request_, LAST)

    assert len(statuses) == 1
    assert statuses[0] in (400, 501, 505)
    assert "Traceback" not in api.log.getvalue()
    assert connection.execute("SELECT count(*) AS users FROM users").fetchone() == {"users": 0}
    assert api.create().status_code == 201


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT"])
@pytest.mark.parametrize("path", [b"/healthz", b"/nope"])
def test_an_unexpected_body_is_read(api: Api, method: bytes, path: bytes) -> None:
    """The body of any method is not parsed as a request."""
    smuggled = b"POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    head = method + b" " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(smuggled)

    statuses = exchange(api.port, head, smuggled, LAST)

    assert len(statuses) == 2
    assert statuses[1] == 200


def test_pipelined_requests_are_answered_in_order(api: Api) -> None:
    """Ten pipelined requests, sign-ups among them, get ten answers in order."""
    requests: list[bytes] = []
    for number in range(3):
        body = json.dumps(user(f"user_{number}")).encode()
        requests += [HEALTH, sign_up(b"Host: x", b"Content-Length: %d" % len(body), body=body), EMPTY]
    assert exchange(api.port, *requests, LAST) == [200, 201, 400] * 3 + [200]
