"""Runs a mail server that accepts and discards all mail: Postfix's smtp-sink if it is installed, else our own.

`python -m bench.sink PORT` runs our own. It speaks a minimum of SMTP, to use little CPU.
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

_START_TIMEOUT = 10.0
"""Seconds that the server may take to start."""
_MAX_CONNECTIONS = 1000


@dataclass(frozen=True)
class Sink:
    """A running mail server."""

    url: str
    kind: str
    """Name of the program, for the results."""


@contextmanager
def open_sink() -> Iterator[Sink]:
    """Runs a mail server in a process of its own until the block ends.

    Raises:
        RuntimeError: it does not start.
    """
    port = free_port()
    # Debian installs it into /usr/sbin, which is not on every PATH.
    program = shutil.which("smtp-sink") or shutil.which("smtp-sink", path="/usr/sbin:/usr/local/sbin")
    if program:
        user = ["-u", "nobody"] if is_root() else []  # it refuses to run as root
        kind = "smtp-sink"
        command = [program, *user, "-m", str(_MAX_CONNECTIONS), f"127.0.0.1:{port}", str(_MAX_CONNECTIONS)]
    else:
        kind, command = "bench.sink", [sys.executable, "-m", "bench.sink", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603 - fixed commands
    try:
        _await_greeting(process, port)
        yield Sink(f"smtp://127.0.0.1:{port}", kind)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_greeting(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            if connection.recv(3) == b"220":
                return
        time.sleep(0.02)
    raise RuntimeError(f"the mail server did not start (exit code {process.poll()})")


async def serve(port: int) -> None:
    """Serves until the process is stopped."""
    server = await asyncio.start_server(_session, "127.0.0.1", port, backlog=_MAX_CONNECTIONS)
    await server.serve_forever()


async def _session(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        writer.write(b"220 bench.sink ESMTP\r\n")
        while True:
            command = (await reader.readuntil(b"\r\n"))[:4].upper()
            if command == b"DATA":
                writer.write(b"354 go on\r\n")
                await reader.readuntil(b"\r\n.\r\n")
                writer.write(b"250 accepted\r\n")
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
