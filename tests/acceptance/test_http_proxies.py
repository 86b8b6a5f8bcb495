"""Behind a real reverse proxy with persistent connections, each client gets the answers to its own requests."""

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from outbox.runtime.settings import ServiceSettings
from tests.support import http_proxies
from tests.support.api import serve, user
from tests.support.http_client import RawClient

ROUNDS = 40


@pytest.fixture(params=["nginx", "haproxy"])
def port(request: pytest.FixtureRequest, tmp_path: Path, service_settings: ServiceSettings) -> Iterator[int]:
    """The port of a proxy in front of a service."""
    name = str(request.param)
    if http_proxies.find_program(name) is None:
        pytest.skip(f"{name} is not installed")
    with serve(service_settings) as api, http_proxies.run_proxy(name, tmp_path, api.port) as port:
        yield port


def sign_up_offering_upgrade(port: int, worker: int) -> Counter[object]:
    """Signs users up as Java's client does, which offers HTTP/2 with every request."""
    answers: Counter[object] = Counter()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", verify=False, timeout=20) as client:
        for number in range(ROUNDS):
            name = f"up_{worker}_{number}"
            headers = {
                "X-Request-ID": name,
                "Connection": "Upgrade, HTTP2-Settings",
                "Upgrade": "h2c",
                "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
            }
            response = client.post("/v1/users", json=user(name), headers=headers)
            answers[response.status_code, response.headers.get("x-request-id") == name] += 1
    return answers


def probe(port: int, worker: int) -> Counter[object]:
    """Requests `/healthz`, which is answered at once, each time with a unique id."""
    answers: Counter[object] = Counter()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", verify=False, timeout=20) as client:
        for number in range(ROUNDS * 5):
            sent = f"probe_{worker}_{number}"
            response = client.get("/healthz", headers={"X-Request-ID": sent})
            answers[response.status_code, response.headers.get("x-request-id") == sent] += 1
    return answers


def test_nobody_gets_the_answer_to_another_request(port: int) -> None:
    """Sign-ups that offer an upgrade, and other requests on the same persistent connections, get their own answers."""
    with ThreadPoolExecutor(6) as threads:
        sign_ups = [threads.submit(sign_up_offering_upgrade, port, worker) for worker in range(3)]
        probes = [threads.submit(probe, port, worker) for worker in range(3)]
        assert sum((future.result() for future in sign_ups), Counter()) == {(201, True): 3 * ROUNDS}
        assert sum((future.result() for future in probes), Counter()) == {(200, True): 15 * ROUNDS}


INNER = [
    b"GET /readyz HTTP/1.1\r\nHost: x\r\nX-Request-ID: in_%s\r\n\r\n",
    b"POST /v1/users HTTP/1.1\r\nHost: x\r\nX-Request-ID: in_%%s\r\nContent-Length: %d\r\n\r\n%s"
    % (len(json.dumps(user())), json.dumps(user()).encode()),
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-ID: in_%s\r\nX: ",
]
"""Requests inside the bodies of others: one that is answered at once, one that is slow, and an unfinished one."""
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"
LENGTH = b"Content-Length: LENGTH\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
VALID = [LENGTH, UPGRADE + LENGTH, CHUNKED, UPGRADE + CHUNKED]
REFUSED = [
    LENGTH + b"Content-Length: 0\r\n",
    LENGTH + CHUNKED,
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding: identity, chunked\r\n",
]


class Mixed(NamedTuple):
    """A request with any method and framing."""

    marker: str
    method: bytes
    head: bytes
    body: bytes
    is_valid: bool
    """Whether the proxy and the service must parse it."""


def mixed_request(rng: random.Random, name: str) -> Mixed:
    """Returns a random request with this name as its marker."""
    marker = name.encode()
    method, path = rng.choice([(b"GET", b"/healthz"), (b"HEAD", b"/healthz"), (b"POST", b"/v1/users")])
    framing = rng.choice(VALID * 2 + REFUSED)
    body = rng.choice(INNER) % marker
    if framing.endswith(b" chunked\r\n"):
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    line = b"%s %s HTTP/1.1\r\n" % (method, path)
    head = line + b"Host: x\r\nX-Request-ID: %s\r\nContent-Type: application/json\r\n" % marker
    framing_lines = framing.replace(b"LENGTH", b"%d" % len(body))
    return Mixed(name, method, head + framing_lines + b"\r\n", body, framing in VALID)


def send(client: RawClient, request: Mixed, pause: float) -> None:
    """Sends a request, with a pause before its body if given. An error means that it was refused already."""
    with suppress(ConnectionError):
        if pause:
            client.send(request.head)
            time.sleep(pause)
            client.send(request.body)
        else:
            client.send(request.head, request.body)


def mix(port: int, worker: int, rounds: int) -> Counter[str]:
    """Sends pipelined random requests, and counts the answers by the request that they belong to."""
    counts: Counter[str] = Counter()
    rng = random.Random(worker)
    for number in range(rounds):
        names = [f"mixed_{worker}_{number}_{one}" for one in range(rng.randint(1, 6))]
        requests = [mixed_request(rng, name) for name in names]
        pause = rng.choice([0, 0.003])
        with RawClient(port) as client:
            for request in requests:
                send(client, request, pause)
            for request in requests:
                if not (answer := client.answer(to_head=request.method == b"HEAD")):
                    counts["none"] += 1
                    break
                request_id = answer.headers.get("x-request-id", "")
                if request_id == request.marker:
                    counts["own"] += 1
                elif not request.is_valid and answer.status >= 400 and "_" not in request_id:
                    counts["refused"] += 1
                else:
                    counts["another's"] += 1
                if not request.is_valid:  # what follows is not parsed
                    counts["another's"] += client.rest().count(b"HTTP/1.")
                    break
    return counts


def test_mixed_requests_get_their_own_answers(port: int) -> None:
    """Pipelined requests with bodies on any method, offered upgrades, chunks, and ambiguous framing."""
    with ThreadPoolExecutor(8) as threads:
        counts = sum(threads.map(lambda worker: mix(port, worker, ROUNDS), range(8)), Counter[str]())
    assert counts["another's"] == 0
    assert counts["own"] > 5 * ROUNDS
    assert counts["refused"] > ROUNDS


SMUGGLED = b"POST /v1/users HTTP/1.1\r\nHost: x\r\nX-Request-ID: smuggled\r\nContent-Length: 0\r\n\r\n"
BODY = json.dumps(user()).encode()
SMUGGLING = {
    "a length and chunks": b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % (5 + len(SMUGGLED)),
    "two lengths": b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED),
    "a folded length": b"Content-Length:\r\n 0\r\nX: a\r\n\r\n",
    "another coding": b"Transfer-Encoding: gzip, chunked\r\nContent-Length: 0\r\n\r\n",
    "a hidden coding": b"Transfer-Encoding: \x0bchunked\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED),
    "bare LF": b"X: a\nTransfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED),
    "an offered upgrade": b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED),
}


@pytest.mark.parametrize("framing", SMUGGLING.values(), ids=SMUGGLING)
def test_nothing_is_smuggled_through(port: int, framing: bytes) -> None:
    """A request inside the body of another is not executed: the next client gets its own answer."""
    head = b"POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head + framing + SMUGGLED)
            connection.settimeout(0.3)
            with suppress(TimeoutError, ConnectionResetError):
                connection.recv(65_536)
        assert probe(port, 0) == {(200, True): 5 * ROUNDS}
