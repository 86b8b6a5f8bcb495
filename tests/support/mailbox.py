"""SMTP servers for tests: one that keeps mails and rejects on request, and one that misbehaves."""

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from io import BufferedReader
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session

if TYPE_CHECKING:
    import trustme


PIPELINING = True
"""Whether these servers support pipelining (RFC 2920)."""


def _authenticate(*args: Any) -> AuthResult:
    data = args[-1]
    return AuthResult(success=(data.login, data.password) == (b"user@x", b"p:/w"), handled=False)


LOGIN: dict[str, Any] = {"authenticator": _authenticate, "auth_required": True}
"""Options of `serve_mailbox` that require a login as `user@x` with the password `p:/w`."""


@dataclass
class Mailbox:
    """The mails that a server received, and its replies."""

    port: int = 0
    received: list[tuple[str, bytes]] = field(default_factory=list)
    """The recipient of the envelope, and the mail as received."""
    rcpt_reply: str = "250 OK"
    data_reply: str = "250 OK"
    mail_reply: str = "250 OK"
    data_delay: float = 0
    """Seconds before the reply to a mail; if the client disconnects during them, the mail is not kept."""
    mail_delay: float = 0
    """Seconds before the reply to MAIL FROM."""
    taking: int = 0
    """Number of mails that the server has begun to accept."""
    connections: int = 0
    helos: list[str] = field(default_factory=list)
    """The names in EHLO, by connection."""
    lock: Lock = field(default_factory=Lock)
    parsed: list[tuple[str, EmailMessage]] = field(default_factory=list, repr=False)

    @property
    def mails(self) -> list[tuple[str, EmailMessage]]:
        """The recipient of the envelope, and the mail. Parsed on access: parsing takes longer than receiving."""
        with self.lock:
            for recipient, content in self.received[len(self.parsed) :]:
                mail = message_from_bytes(content, policy=policy.default)
                assert isinstance(mail, EmailMessage)
                self.parsed.append((recipient, mail))
            return list(self.parsed)

    @property
    def url(self) -> str:
        """The value for `SMTP_URL`."""
        return f"smtp://127.0.0.1:{self.port}"

    def to(self, recipient: str) -> list[EmailMessage]:
        """Returns the mails of a recipient."""
        return [mail for address, mail in self.mails if address == recipient]

    # aiosmtpd's hooks.

    async def handle_EHLO(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        """Counts the connection, and answers EHLO."""
        session.host_name = hostname
        self.helos.append(hostname)
        self.connections += 1
        return [*(["250-PIPELINING"] if PIPELINING else []), *responses]

    async def handle_MAIL(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """Answers MAIL FROM."""
        if self.mail_delay:
            await asyncio.sleep(self.mail_delay)
        if self.mail_reply.startswith("250"):
            envelope.mail_from = address
            envelope.mail_options.extend(options)
        return self.mail_reply

    async def handle_RCPT(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """Answers RCPT TO."""
        if self.rcpt_reply.startswith("250"):
            envelope.rcpt_tos.append(address)
        return self.rcpt_reply

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        """Answers DATA, and keeps the mail if it accepts it."""
        self.taking += 1
        if self.data_delay:
            await asyncio.sleep(self.data_delay)  # aiosmtpd cancels it when the client disconnects
        if self.data_reply.startswith("250"):
            content = envelope.content
            assert isinstance(content, bytes)
            with self.lock:
                self.received.extend((recipient, content) for recipient in envelope.rcpt_tos)
        return self.data_reply


@contextmanager
def serve_mailbox(port: int | None = None, **options: Any) -> Iterator[Mailbox]:
    """Runs a mailbox on this machine.

    Args:
        port: the port to listen on; a free one by default.
        options: further arguments of aiosmtpd's Controller, for TLS and logins.
    """
    mailbox = Mailbox(port=port or free_port())
    controller = Controller(mailbox, hostname="127.0.0.1", port=mailbox.port, **options)
    controller.start()
    try:
        yield mailbox
    finally:
        controller.stop()


def tls(authority: "trustme.CA", name: str = "127.0.0.1") -> ssl.SSLContext:
    """Returns a server's context with a certificate for a name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def free_port() -> int:
    """Returns a port on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def link_in(mail: EmailMessage) -> str:
    """Returns the verification link in a mail's text part."""
    body = mail.get_body(("plain",))
    assert body is not None
    found = re.search(r"https?://\S+/v1/verify_email\?\S+", body.get_content())
    assert found, "the mail has no link"
    return found[0]


@dataclass
class ScriptedServer:
    """An SMTP server on a bare socket that misbehaves at chosen steps."""

    replies: dict[str, bytes | None]
    """The reply by step (CONNECT, EHLO, MAIL, RCPT, DATA, "." and so on); b"" disconnects, None hangs."""
    close_after: int | None
    """Number of mails that it accepts per connection before it replies 421."""
    resets: bool
    """Whether it resets the connection in the middle of a mail."""
    limit: int | None
    """Maximum number of open connections; further ones get 421."""
    port: int
    mails: int = 0
    connections: int = 0
    helos: list[str] = field(default_factory=list)
    """The names in EHLO, by connection."""
    refused: int = 0
    """Number of connections over the limit."""
    open: list[socket.socket] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)
    stop: Callable[[], None] = lambda: None
    """Stops the server as if its process ended: it listens no more, and all connections break."""

    @property
    def url(self) -> str:
        """The value for `SMTP_URL`."""
        return f"smtp://127.0.0.1:{self.port}"

    def reply_to(self, step: str, mails: int) -> bytes | None:
        """Returns the reply at a step of a connection that has accepted so many mails."""
        if step == "MAIL" and self.close_after is not None and mails >= self.close_after:
            return b"421 4.7.0 enough"
        usual = b"250-this\r\n250 PIPELINING" if step == "EHLO" and PIPELINING else _REPLIES.get(step, b"250 OK")
        return self.replies.get(step, usual)

    def disconnect(self) -> None:
        """Closes all connections."""
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def serve(self, connection: socket.socket) -> None:
        """Serves a client until one of both disconnects; rejects it if the limit is reached."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.lock:
            self.connections += 1
            is_over_limit = self.limit is not None and len(self.open) >= self.limit
            self.refused += is_over_limit
            if not is_over_limit:
                self.open.append(connection)
        with connection:
            if is_over_limit:
                connection.sendall(b"421 4.7.0 too many concurrent SMTP connections\r\n")
                return
            try:
                self._talk(connection)
            finally:
                with self.lock:
                    self.open.remove(connection)

    def _talk(self, connection: socket.socket) -> None:
        mails = 0
        with connection.makefile("rb") as lines:
            step = "CONNECT"
            while True:
                reply = self.reply_to(step, mails)
                if reply is None:
                    lines.read()  # until the client disconnects
                if not reply:
                    return
                connection.sendall(reply + b"\r\n")
                if reply.startswith(b"421"):
                    return
                if step == "DATA" and reply.startswith(b"354"):
                    if self.resets:
                        lines.readline()
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return
                    if not _read_mail(lines):
                        return
                    step = "."
                    continue
                if step == "." and reply.startswith(b"250"):
                    mails += 1
                    self.mails += 1
                if not (line := lines.readline()):
                    return
                step, *words = line.decode(errors="replace").upper().split()
                self.helos += words if step == "EHLO" else []


def _read_mail(lines: BufferedReader) -> bool:
    """Reads a mail, and returns whether its end arrived."""
    return any(line == b".\r\n" for line in lines)


_REPLIES = {"CONNECT": b"220 ready", "DATA": b"354 go on", "QUIT": b"221 bye"}


@contextmanager
def serve_script(
    replies: dict[str, bytes | None] | None = None,
    close_after: int | None = None,
    *,
    resets: bool = False,
    limit: int | None = None,
    port: int = 0,
) -> Iterator[ScriptedServer]:
    """Runs a server that misbehaves.

    Args:
        replies: its replies at the steps where it misbehaves.
        close_after: number of mails that it accepts per connection.
        resets: whether it resets the connection in the middle of a mail.
        limit: maximum number of open connections.
        port: the port to listen on; a free one by default.
    """
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = ScriptedServer(dict(replies or {}), close_after, resets, limit, listener.getsockname()[1])

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                Thread(target=_serve_quietly, args=(server, connection), daemon=True).start()

        accepting = Thread(target=accept, daemon=True)
        accepting.start()

        def stop() -> None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            accepting.join(5)
            server.disconnect()

        server.stop = stop
        yield server
        stop()


def _serve_quietly(server: ScriptedServer, connection: socket.socket) -> None:
    with suppress(OSError):
        server.serve(connection)
