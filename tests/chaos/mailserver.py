"""A mail server that records every accepted mail, and misbehaves at any step on request."""

import asyncio
import random
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trustme

from tests.chaos.evidence import Mail, Overlap, Session
from tests.chaos.mailsession import MailSession

CONNECT_STEPS = ("connect", "ehlo", "starttls", "handshake", "auth")
"""Steps that a client rarely reaches while it keeps its connections: it must be made to reconnect."""


@dataclass(frozen=True)
class Misbehaviour:
    """What the server does wrong, and at which step."""

    step: str
    """`connect`, `ehlo`, `starttls`, `handshake`, `auth`, `mail`, `rcpt`, `data`, `body`, `dot` or `quit`."""
    does: str
    """`hang`, `reset`, `4xx`, `5xx`; at `rcpt` also `address` (5xx for the recipient); at `dot` also `slow`,
    `take and hang`, `take and reset`; at `handshake` `wrong name`, `unknown authority`, `garbage`."""
    share: float = 1.0
    """Probability, each time that a client reaches this step."""
    worker: int | None = None
    """The only worker slot that is affected; None for all."""


class MailServer:
    """Listens on one port per worker slot, to identify the sender."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        """Creates certificates, and does not listen yet.

        Args:
            folder: where the certificate of the authority is written.
            draw: source of all randomness.
        """
        self.draw = draw
        self.mails: list[Mail] = []
        self.sessions: list[Session] = []
        self.overlaps: list[Overlap] = []
        self.refused_addresses: dict[str, float] = {}
        self.sessions_by_recipient: dict[str, Session] = {}
        """For each recipient, the session that is sending to it."""
        self.misbehaviour: Misbehaviour | None = None
        self.accepted = asyncio.Event()
        """Set at every accepted mail, for faults that wait for one."""
        self.authority = folder / "authority.pem"
        trusted = trustme.CA()
        trusted.cert_pem.write_to_path(str(self.authority))
        self.certificates = {
            "right": _context(trusted, "127.0.0.1"),
            "wrong name": _context(trusted, "mail.example.org"),
            "unknown authority": _context(trustme.CA(), "127.0.0.1"),
        }
        self.connection_limit: int | None = None
        """Maximum number of connections; None for no limit."""
        self._servers: list[asyncio.Server] = []
        self._open: set[MailSession] = set()

    async def listen(self, worker: int) -> int:
        """Listens for one worker slot and returns the port."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(worker, reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self._servers.append(server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    def close(self) -> None:
        """Stops listening, and closes all sessions."""
        for server in self._servers:
            server.close()
        for session in list(self._open):
            session.close()

    def close_idle_sessions(self, limit: int | None = None) -> None:
        """Closes idle sessions, as servers do: at most `limit`, or all."""
        for session in [session for session in self._open if session.is_idle][:limit]:
            session.close()

    def limit_connections(self, limit: int) -> None:
        """Limits the number of connections, and closes idle sessions above the limit."""
        self.connection_limit = limit
        self.close_idle_sessions(max(0, len(self._open) - limit))

    def has_too_many_sessions(self) -> bool:
        """Whether there are more connections than the limit."""
        return self.connection_limit is not None and len(self._open) > self.connection_limit

    def misbehaves(self, step: str, worker: int) -> str:
        """Returns what to do wrong at a step this time; empty for nothing."""
        bad = self.misbehaviour
        if bad is None or bad.step != step or bad.worker not in (None, worker):
            return ""
        return bad.does if self.draw.random() < bad.share else ""

    async def _serve(self, worker: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("peername")[1]
        record = Session(len(self.sessions), worker, port, time.time())
        self.sessions.append(record)
        session = MailSession(self, record, reader, writer)
        self._open.add(session)
        try:
            # CancelledError is the end of the run; asyncio's streams would log it.
            with suppress(OSError, asyncio.IncompleteReadError, ssl.SSLError, ValueError, asyncio.CancelledError):
                await session.serve()
        finally:
            record.ended = time.time()
            self._open.discard(session)
            session.forget_recipient()
            session.close()


def _context(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context
