"""A mail server that takes every mail and throws it away: postfix' smtp-sink where there is one, else our own.

Our own runs as `python -m bench.sink PORT`: it knows just enough SMTP, so that it costs the machine little.
"""

import asyncio
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from outbox.devstack.unprivileged import is_root
from tests.support.mailbox import free_port

_START_LIMIT = 10.0
_CONNECTIONS = 1000


@dataclass(frozen=True)
class Sink:
    """A running mail server."""

    url: str
    kind: str
    """What it is, for the notes."""


@contextmanager
def open_sink() -> Iterator[Sink]:
    """Runs a mail server in a process of its own until the block is left.

    Raises:
        RuntimeError: it does not come up.
    """
    port = free_port()
    # Debian has it in a folder for administrators, which is not on everybody's path.
    program = shutil.which("smtp-sink") or shutil.which("smtp-sink", path="/usr/sbin:/usr/local/sbin")
    if program:
        user = ["-u", "nobody"] if is_root() else []  # it insists
        kind = "smtp-sink"
        command = [program, *user, "-m", str(_CONNECTIONS), f"127.0.0.1:{port}", str(_CONNECTIONS)]
    else:
        kind, command = "bench.sink", [sys.executable, "-m", "bench.sink", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603 - both are what is meant
    try:
        _await(process, port)
        yield Sink(f"smtp://127.0.0.1:{port}", kind)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_LIMIT
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            if connection.recv(3) == b"220":
                return
        time.sleep(0.02)
    raise RuntimeError(f"the mail server does not come up (exit code {process.poll()})")


async def serve(port: int) -> None:
    """Serves for ever."""
    server = await asyncio.start_server(_session, "127.0.0.1", port, backlog=_CONNECTIONS)
    await server.serve_forever()


async def _session(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        writer.write(b"220 bench.sink ESMTP\r\n")
        while True:
            command = (await reader.readuntil(b"\r\n"))[:4].upper()
            if command == b"DATA":
                writer.write(b"354 go on\r\n")
                await reader.readuntil(b"\r\n.\r\n")
                writer.write(b"250 taken\r\n")
            elif command == b"QUIT":
                writer.write(b"221 bye\r\n")
                break
            elif command == b"EHLO":
                writer.write(b"250-bench.sink\r\n250-8BITMIME\r\n250 SMTPUTF8\r\n")
            else:
                writer.write(b"250 ok\r\n")
    writer.close()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(int(sys.argv[1])))
