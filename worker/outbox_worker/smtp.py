"""An SMTP connection each of whose steps ends in time, whatever the server does."""

import io
import smtplib
import socket
import time
from typing import Any

from outbox_worker import deadline

FINISHING_TIME = 4.0
"""Seconds that the answer to a whole mail is waited for at least, however little time the attempt has left: the server
may be taking it. Shorter than the grace after which an attempt is overdue."""

MAX_REPLY = 64 * 1024
"""Bytes that a server may send in one step: all lines of an answer are kept until the last has come."""

SHORTEST = 0.001
"""Seconds: a socket takes 0 for "do not wait"."""


class Smtp(smtplib.SMTP):
    """smtplib's commands, with one time limit for the whole of a step: `timeout`, or what the attempt has left.

    smtplib's own limit starts anew with each packet of an answer.
    """

    timeout: float
    _host: str
    """Whose certificate TLS expects."""
    _opened: socket.socket | None = None
    _answers: "_Answers | None" = None

    def begin(self, opened: socket.socket, host: str, port: int) -> None:
        """Reads the greeting on a connection that is open; `host` is the name that it was looked up by.

        Raises:
            smtplib.SMTPConnectError: it is no welcome.
        """
        self._opened, self._host = opened, host
        code, text = self.connect(host, port)
        if code != 220:
            raise smtplib.SMTPConnectError(code, text)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:  # noqa: ARG002 - smtplib's signature
        assert self._opened is not None
        self._opened.settimeout(max(SHORTEST, min(timeout, deadline.remaining())))
        return self._opened

    def send(self, s: Any) -> None:
        """Sends in one step.

        Raises:
            TimeLimitError: the attempt has no time left.
        """
        seconds = deadline.begin_step(self.timeout)
        if self.file is None:  # connected, or in TLS, a moment ago: the answers of before are another socket's
            self._answers = None
            if self.sock is not None:
                self.sock.settimeout(seconds)
        if self._answers is not None:
            self._answers.limit(seconds)
        super().send(s)

    def docmd(self, cmd: str, args: str = "") -> tuple[int, bytes]:
        """Sends a command and reads its answer; after STARTTLS, limits the handshake that follows.

        Raises:
            TimeLimitError: the attempt has no time left.
        """
        reply = super().docmd(cmd, args)
        if cmd == "STARTTLS" and self.sock is not None:
            self.sock.settimeout(deadline.begin_step(self.timeout))
        return reply

    def getreply(self, at_least: float = 0.0) -> tuple[int, bytes]:
        """Reads a whole answer in one step.

        Args:
            at_least: seconds that it is waited for though the attempt has no such time left.
        """
        if self.file is None and self.sock is not None:
            self._answers = _Answers(self.sock)
            self.file = io.BufferedReader(self._answers)
        if self._answers is not None:
            self._answers.limit(min(self.timeout, max(at_least, deadline.remaining())))
        return super().getreply()


class SmtpOverTls(smtplib.SMTP_SSL, Smtp):
    """The same in TLS from the first byte."""


class _Answers(io.RawIOBase):
    """What a server sends, read until the current step has to end: each read gets what is left of its time.

    To set the limit of a socket is a system call, in which a thread gives the interpreter away. So it is set only where
    it differs by more than a tenth.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._limit = sock.gettimeout() or 0.0
        self._ends = 0.0
        self._received = 0
        """Bytes in the current step."""

    def limit(self, seconds: float) -> None:
        """Begins a step that may take so long."""
        self._ends = time.monotonic() + seconds
        self._received = 0
        self._arm(seconds)

    def _arm(self, seconds: float) -> None:
        if not 0.9 * self._limit <= seconds <= 1.1 * self._limit:
            self._sock.settimeout(seconds)
            self._limit = seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._ends - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._arm(left)
        received = self._sock.recv_into(buffer)
        self._received += received
        if self._received > MAX_REPLY:
            raise OSError(f"its answer is over {MAX_REPLY // 1024} KiB")
        return received
