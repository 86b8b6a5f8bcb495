"""`python -m bench.load`: clients that create users, in a process of their own so that they hold up nobody else.

It speaks just enough HTTP on bare sockets: a client library would take more of the cores than the service's own code.
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

_PATIENCE = 30.0
"""Seconds for the last answers."""


@dataclass(frozen=True)
class Load:
    """What the clients saw."""

    rate: float
    """Users created per second."""
    waits: list[float]
    """How long each answer took, in ms."""
    refused: int
    """Answers other than 201."""
    requests: int
    """All that were answered, before and after the measured time too."""
    cpu: float
    """Seconds of CPU that the clients themselves took for all of them."""


def create_users(port: int, clients: int, seconds: float, name: str, warmup: float = 0.2) -> Load:
    """Creates users for a while, each client one after the other on a connection that it keeps.

    Args:
        port: where the service is, on this machine.
        clients: how many at a time.
        seconds: how long it is measured.
        name: what the users' names begin with; no two loads on one database may have the same.
        warmup: seconds before that.

    Raises:
        RuntimeError: an answer did not come, or too few did.
    """
    command = [sys.executable, "-m", "bench.load", str(port), str(clients), str(seconds), name, str(warmup)]
    done = subprocess.run(  # noqa: S603 - this very module
        command, capture_output=True, text=True, timeout=seconds + warmup + 2 * _PATIENCE, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the clients ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return Load(**json.loads(done.stdout))


class _Answers:
    """What all clients share: the time that is left, and what was answered so far."""

    def __init__(self, over: float, name: str, clients: int) -> None:
        self.over = over
        self.ended: list[tuple[float, float, int]] = []
        """When an answer was complete, how long it took, and its status."""
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

    def client_ended(self, failure: str | None) -> None:
        """Takes note that a client stops, for a reason that is none of its own if there is one."""
        if failure:
            self.failures.append(failure)
        self._clients -= 1
        if self._clients == 0:
            self.done.set()

    def load(self, warm: float) -> Load:
        """Returns what there is to say of the answers that came between `warm` and the end."""
        counted = [(ended, wait, status) for ended, wait, status in self.ended if warm <= ended <= self.over]
        created = [ended for ended, _, status in counted if status == 201]
        if self.failures or len(created) < 2:
            raise SystemExit(f"{len(created)} users were created; failures: {self.failures[:3] or 'none'}")
        return Load(
            # From one answer to another: a window cut at fixed times would count one answer more or less.
            rate=(len(created) - 1) / (max(created) - min(created)),
            waits=[round(wait * 1000, 3) for _, wait, status in counted if status == 201],
            refused=len(counted) - len(created),
            requests=len(self.ended),
            cpu=time.process_time() - self._cpu_before,
        )


class _Client(asyncio.Protocol):
    def __init__(self, answers: _Answers) -> None:
        self._answers = answers
        self._received = b""
        self._sent_at = 0.0
        self._is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(self._answers.request())

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or not (length := _LENGTH.search(head)) or len(body) < int(length[1]):
            return
        now = time.perf_counter()
        self._answers.ended.append((now, now - self._sent_at, int(head[9:12])))
        self._received = b""
        if now < self._answers.over:
            self._send()
        else:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._is_over:
            self._end(f"the service hung up: {exc!r}")

    def _end(self, failure: str | None) -> None:
        self._is_over = True
        self._transport.close()
        self._answers.client_ended(failure)


async def _run(port: int, clients: int, seconds: float, name: str, warmup: float) -> Load:
    begun = time.perf_counter()
    answers = _Answers(begun + warmup + seconds, name, clients)
    loop = asyncio.get_running_loop()
    for _ in range(clients):
        await loop.create_connection(lambda: _Client(answers), "127.0.0.1", port)
    async with asyncio.timeout(warmup + seconds + _PATIENCE):
        await answers.done.wait()
    return answers.load(begun + warmup)


def main() -> None:
    """Prints what the clients saw, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.load")
    parser.add_argument("port", type=int)
    parser.add_argument("clients", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("name")
    parser.add_argument("warmup", type=float)
    given = parser.parse_args()
    print(json.dumps(asdict(uvloop.run(_run(**vars(given))))))  # noqa: T201 - its output


if __name__ == "__main__":
    main()
