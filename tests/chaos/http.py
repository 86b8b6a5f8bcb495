"""Sends one HTTP request on a new connection.

A client library's connection pool would cost this process, through which all bytes pass, more than the rest of the run.
"""

import asyncio
import json
from typing import NamedTuple


class NoAnswerError(Exception):
    """The connection failed, or the answer was incomplete at the timeout."""


class Answer(NamedTuple):
    """A complete answer."""

    status: int
    body: str
    headers: dict[str, str]
    """By name in lower case."""


async def post(
    port: int,
    path: str,
    body: object,
    timeout: float,  # noqa: ASYNC109 - a client's patience
    key: str = "",
) -> Answer:
    """Posts JSON to this machine, with an Idempotency-Key if there is one, and returns the answer.

    Raises:
        NoAnswerError: it is unknown whether the request was handled.
    """
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    if key:
        head += f"Idempotency-Key: {key}\r\n"
    request = f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content
    try:
        async with asyncio.timeout(timeout):
            return _read(await _exchange(port, request))
    except (OSError, ValueError) as error:  # the timeout is an OSError too
        raise NoAnswerError(f"{type(error).__name__}: {error}") from error


async def _exchange(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await reader.read()
    finally:
        writer.transport.abort()


def _read(answer: bytes) -> Answer:
    head, separator, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if not separator or len(body) != int(headers.get("content-length", "-1")):
        raise ValueError("the answer is not complete")
    return Answer(int(status.split()[1]), body.decode(errors="replace"), headers)
