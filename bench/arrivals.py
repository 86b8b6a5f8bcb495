"""`python -m bench.arrivals`: a mail server that records the arrival time of each mail."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import uvloop


class Arrivals:
    """Controls the process of the mail server."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.url = f"smtp://127.0.0.1:{self._read_line().strip()}"
        """Value for SMTP_URL."""

    def take(self) -> dict[str, float]:
        """Returns and forgets the arrival time of each mail by recipient: when the end of its DATA was received.

        Times are of `time.monotonic`, which all processes of a machine share.
        """
        assert self._process.stdin
        self._process.stdin.write("take\n")
        self._process.stdin.flush()
        return cast("dict[str, float]", json.loads(self._read_line()))

    def _read_line(self) -> str:
        assert self._process.stdout
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"the mail server ended with {self._process.wait(10)}")
        return line


@contextmanager
def record_arrivals() -> Iterator[Arrivals]:
    """Runs the mail server on a free port until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench.arrivals"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Arrivals(process)
        finally:
            process.terminate()


class _Session(asyncio.Protocol):
    """One connection. The client is trusted to speak correct SMTP."""

    def __init__(self, arrivals: dict[str, float]) -> None:
        self._arrivals = arrivals
        self._received = b""
        self._in_data = False
        self._recipients: list[str] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(b"220 bench\r\n")

    def data_received(self, data: bytes) -> None:
        self._received += data
        while self._take_mail() if self._in_data else self._take_command():
            pass

    def _take_mail(self) -> bool:
        _, separator, rest = self._received.partition(b"\r\n.\r\n")
        if not separator:
            return False
        now = time.monotonic()
        self._arrivals.update(dict.fromkeys(self._recipients, now))
        self._received, self._in_data, self._recipients = rest, False, []
        self._transport.write(b"250 accepted\r\n")
        return True

    def _take_command(self) -> bool:
        line, separator, rest = self._received.partition(b"\r\n")
        if not separator:
            return False
        self._received = rest
        match line[:4].upper():
            case b"EHLO":
                self._transport.write(b"250-bench\r\n250-8BITMIME\r\n250 SMTPUTF8\r\n")
            case b"RCPT":
                self._recipients.append(line[line.index(b"<") + 1 : line.index(b">")].decode())
                self._transport.write(b"250 OK\r\n")
            case b"DATA":
                # The line break lets an empty mail, which is only the final dot, match.
                self._in_data, self._received = True, b"\r\n" + self._received
                self._transport.write(b"354 go on\r\n")
            case b"QUIT":
                self._transport.write(b"221 bye\r\n")
                self._transport.close()
            case b"RSET":
                self._recipients = []
                self._transport.write(b"250 OK\r\n")
            case _:
                self._transport.write(b"250 OK\r\n")
        return True


async def _serve() -> None:
    arrivals: dict[str, float] = {}
    server = await asyncio.get_running_loop().create_server(lambda: _Session(arrivals), "127.0.0.1", 0, backlog=512)
    _write_line(str(server.sockets[0].getsockname()[1]))
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while await commands.readline():  # until the parent process ends
        _write_line(json.dumps(arrivals))
        arrivals.clear()


def _write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Serves until standard input ends."""
    uvloop.run(_serve())


if __name__ == "__main__":
    main()
