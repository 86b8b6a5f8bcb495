"""An SMTP connection that limits the time of every step, whatever the server does."""

import io
import smtplib
import socket
import time
from typing import Any

from outbox_worker import deadline

FINISHING_TIME = 4.0
"""Minimum seconds to wait for the reply to a complete mail, even if the attempt has less time left: the server may be
accepting it. Shorter than the grace after which an attempt is overdue."""

MAX_REPLY = 64 * 1024
"""Bytes that a server may send in one step: smtplib keeps all lines of a reply until the last one."""

MIN_TIMEOUT = 0.001
"""Seconds. A time-out of 0 makes a socket non-blocking."""


class Smtp(smtplib.SMTP):
    """smtplib's client with one time limit per step: `timeout` or the attempt's time left, whichever is less.

    smtplib's own limit restarts with each packet of a reply.
    """

    timeout: float
    _host: str
    """The name that the server's certificate must have."""
    _opened: socket.socket | None = None
    _replies: "_ReplyStream | None" = None

    def read_greeting(self, opened: socket.socket, host: str, port: int) -> None:
        """Reads the server's greeting from an open socket.

        Args:
            opened: the socket.
            host: the name that was looked up.
            port: of the server.

        Raises:
            smtplib.SMTPConnectError: the server rejects the connection.
        """
        self._opened, self._host = opened, host
        code, text = self.connect(host, port)
        if code != 220:
            raise smtplib.SMTPConnectError(code, text)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:  # noqa: ARG002 - smtplib's signature
        assert self._opened is not None
        self._opened.settimeout(max(MIN_TIMEOUT, min(timeout, deadline.remaining())))
        return self._opened

    def send(self, s: Any) -> None:
        """Sends in one step.

        Raises:
            TimeLimitError: the attempt has no time left.
        """
        seconds = deadline.begin_step(self.timeout)
        if self.file is None:  # just connected or switched to TLS: earlier replies came from another socket
            self._replies = None
            if self.sock is not None:
                self.sock.settimeout(seconds)
        if self._replies is not None:
            self._replies.begin_step(seconds)
        super().send(s)

    def docmd(self, cmd: str, args: str = "") -> tuple[int, bytes]:
        """Sends a command and reads its reply; after STARTTLS, limits the handshake that follows.

        Raises:
            TimeLimitError: the attempt has no time left.
        """
        reply = super().docmd(cmd, args)
        if cmd == "STARTTLS" and self.sock is not None:
            self.sock.settimeout(deadline.begin_step(self.timeout))
        return reply

    def getreply(self, min_wait: float = 0.0) -> tuple[int, bytes]:
        """Reads a complete reply in one step.

        Args:
            min_wait: minimum seconds to wait, even if the attempt has less time left.
        """
        if self.file is None and self.sock is not None:
            self._replies = _ReplyStream(self.sock)
            self.file = io.BufferedReader(self._replies)
        if self._replies is not None:
            self._replies.begin_step(min(self.timeout, max(min_wait, deadline.remaining())))
        return super().getreply()


class SmtpOverTls(smtplib.SMTP_SSL, Smtp):
    """The same client with TLS from the first byte."""


class _ReplyStream(io.RawIOBase):
    """Reads the server's replies; each read may take the time that is left of the current step.

    Setting a socket's time-out is a system call, in which a thread releases the interpreter. So it is set only if it
    changes by more than a tenth.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._timeout = sock.gettimeout() or 0.0
        self._ends_at = 0.0
        self._received = 0
        """Bytes received in the current step."""

    def begin_step(self, seconds: float) -> None:
        """Begins a step that may take `seconds`."""
        self._ends_at = time.monotonic() + seconds
        self._received = 0
        self._set_timeout(seconds)

    def _set_timeout(self, seconds: float) -> None:
        if not 0.9 * self._timeout <= seconds <= 1.1 * self._timeout:
            self._sock.settimeout(seconds)
            self._timeout = seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._set_timeout(left)
        received = self._sock.recv_into(buffer)
        self._received += received
        if self._received > MAX_REPLY:
            raise OSError(f"its reply is over {MAX_REPLY // 1024} KiB")
        return received
