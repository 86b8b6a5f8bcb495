"""A client that sends raw bytes and reads the answers one by one."""

import socket
from contextlib import suppress
from typing import NamedTuple, Self


class Answer(NamedTuple):
    """An answer's status, headers (names in lower case) and body."""

    status: int
    headers: dict[str, str]
    body: bytes


class RawClient:
    """One connection. Requests can be sent before the answers to earlier ones are read."""

    def __init__(self, port: int) -> None:
        self._connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        self._received = self._connection.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._received.close()
        self._connection.close()

    def send(self, *requests: bytes) -> None:
        """Sends requests in one write."""
        self._connection.sendall(b"".join(requests))

    def answer(self, *, to_head: bool = False) -> Answer | None:
        """Reads the next answer; returns None if the connection is closed.

        Args:
            to_head: whether it answers HEAD, and so has no body whatever its Content-Length says.
        """
        try:
            line = self._received.readline()
            headers: dict[str, str] = {}
            while (header := self._received.readline().strip()) != b"":
                name, _, value = header.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            body = b"" if to_head else self._received.read(int(headers.get("content-length", "0")))
        except ConnectionError:
            return None
        return Answer(int(line.split()[1]), headers, body) if line else None

    def rest(self) -> bytes:
        """Reads everything until the connection is closed."""
        with suppress(ConnectionError):
            return self._received.read()
        return b""
