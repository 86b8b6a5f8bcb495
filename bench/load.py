"""`python -m bench.load`: HTTP clients that create users, in a separate process.

It speaks a minimum of HTTP on bare sockets: a client library would use more CPU than the service's own code.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import cast

import uvloop

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)

_TIMEOUT = 30.0
"""Seconds that the last responses may take."""


@dataclass(frozen=True)
class Load:
    """What the clients measured."""

    rate: float
    """Users created per second."""
    latencies: list[float]
    """Milliseconds to each response with status 201."""
    refused: int
    """Responses with another status than 201."""
    requests: int
    """All requests with a response, including those outside the measured time."""
    cpu: float
    """CPU seconds that the clients used for `requests`."""


def create_users(port: int, clients: int, seconds: float, name: str, warmup: float = 0.2) -> Load:
    """Creates users. Each client sends one request after the other on one connection.

    Args:
        port: port of the service on this machine.
        clients: number of concurrent clients.
        seconds: measured time.
        name: prefix of the user names, which must be unique per database.
        warmup: seconds before the measured time.

    Raises:
        RuntimeError: a client failed or got no response, or fewer than two users were created.
    """
    command = [sys.executable, "-m", "bench.load", str(port), str(clients), str(seconds), name, str(warmup)]
    done = subprocess.run(  # noqa: S603 - this module
        command, capture_output=True, text=True, timeout=seconds + warmup + 2 * _TIMEOUT, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the clients ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return Load(**json.loads(done.stdout))


class _Session:
    """The end time and the responses that all clients share."""

    def __init__(self, ends_at: float, name: str, clients: int) -> None:
        self.ends_at = ends_at
        self.responses: list[tuple[float, float, int]] = []
        """Time of completion, latency in seconds and status of each response."""
        self.failures: list[str] = []
        self.done = asyncio.Event()
        self._name = name
        self._users = 0
        self._cpu_before = time.process_time()
        self._clients = clients

    def request(self) -> bytes:
        """Returns the next user's request, head and body."""
        self._users += 1
        user = f"{self._name}_{self._users}"
        body = (
            f'{{"username":"{user}","password":"correct horse battery","full_name":"A User of the Bench",'
            f'"email":"{user}@example.com"}}'
        ).encode()
        head = b"POST /v1/users HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
        return b"%b%d\r\n\r\n%b" % (head, len(body), body)

    def client_stopped(self, failure: str | None) -> None:
        """Records that a client has stopped, and why if it failed."""
        if failure:
            self.failures.append(failure)
        self._clients -= 1
        if self._clients == 0:
            self.done.set()

    def load(self, begun: float) -> Load:
        """Returns the load between `begun` and the end time."""
        counted = [response for response in self.responses if begun <= response[0] <= self.ends_at]
        created = [at for at, _, status in counted if status == 201]
        if self.failures or len(created) < 2:
            raise SystemExit(f"{len(created)} users were created; failures: {self.failures[:3] or 'none'}")
        return Load(
            # From the first response to the last: between two fixed times, the count would be off by up to one.
            rate=(len(created) - 1) / (max(created) - min(created)),
            latencies=[round(seconds * 1000, 3) for _, seconds, status in counted if status == 201],
            refused=len(counted) - len(created),
            requests=len(self.responses),
            cpu=time.process_time() - self._cpu_before,
        )


class _Client(asyncio.Protocol):
    def __init__(self, session: _Session) -> None:
        self._session = session
        self._received = b""
        self._sent_at = 0.0
        self._has_ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(self._session.request())

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or not (length := _LENGTH.search(head)) or len(body) < int(length[1]):
            return
        now = time.perf_counter()
        self._session.responses.append((now, now - self._sent_at, int(head[9:12])))
        self._received = b""
        if now < self._session.ends_at:
            self._send()
        else:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._has_ended:
            self._end(f"the service closed the connection: {exc!r}")

    def _end(self, failure: str | None) -> None:
        self._has_ended = True
        self._transport.close()
        self._session.client_stopped(failure)


async def _run(port: int, clients: int, seconds: float, name: str, warmup: float) -> Load:
    begun = time.perf_counter()
    session = _Session(begun + warmup + seconds, name, clients)
    loop = asyncio.get_running_loop()
    for _ in range(clients):
        await loop.create_connection(lambda: _Client(session), "127.0.0.1", port)
    async with asyncio.timeout(warmup + seconds + _TIMEOUT):
        await session.done.wait()
    return session.load(begun + warmup)


def main() -> None:
    """Prints the load as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.load")
    parser.add_argument("port", type=int)
    parser.add_argument("clients", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("name")
    parser.add_argument("warmup", type=float)
    arguments = parser.parse_args()
    print(json.dumps(asdict(uvloop.run(_run(**vars(arguments))))))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
