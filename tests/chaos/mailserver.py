"""The mail server: it keeps every mail that it has accepted, and misbehaves at any step when told to."""

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

ON_CONNECTING = ("connect", "ehlo", "starttls", "handshake", "auth")
"""Steps that a client which keeps its connections comes to rarely: it has to be made to connect anew."""


@dataclass(frozen=True)
class Misbehaviour:
    """What the server does wrong for a while."""

    step: str
    """`connect`, `ehlo`, `starttls`, `handshake`, `auth`, `mail`, `rcpt`, `data`, `body`, `dot` or `quit`."""
    does: str
    """`hang`, `reset`, `4xx`, `5xx`; at `rcpt` also `address` (5xx for the recipient); at `dot` also `slow`,
    `take and hang`, `take and reset`; at `handshake` `wrong name`, `unknown authority`, `garbage`."""
    share: float = 1.0
    """Of the times that a client comes to this step."""
    worker: int | None = None
    """The slot whose mails alone are to suffer."""


class MailServer:
    """Listens on one port per worker slot, so that it knows who sends."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        """Makes certificates, and does not listen yet.

        Args:
            folder: where the authority's certificate is put.
            draw: where its latency and shares come from.
        """
        self.draw = draw
        self.mails: list[Mail] = []
        self.sessions: list[Session] = []
        self.overlaps: list[Overlap] = []
        self.refused: dict[str, float] = {}
        self.handled: dict[str, Session] = {}
        """By recipient: the session that is sending to it."""
        self.misbehaviour: Misbehaviour | None = None
        self.accepted = asyncio.Event()
        """Set at every accepted mail, for a fault that waits for one."""
        self.authority = folder / "authority.pem"
        trusted = trustme.CA()
        trusted.cert_pem.write_to_path(str(self.authority))
        self.certificates = {
            "right": _context(trusted, "127.0.0.1"),
            "wrong name": _context(trusted, "mail.example.org"),
            "unknown authority": _context(trustme.CA(), "127.0.0.1"),
        }
        self.most: int | None = None
        """Connections that it takes at a time; None for any number."""
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
        """Stops listening, and hangs up."""
        for server in self._servers:
            server.close()
        for session in list(self._open):
            session.close()

    def hang_up(self, most: int | None = None) -> None:
        """Closes idle sessions, as servers do; no more than so many."""
        for session in [session for session in self._open if session.is_idle][:most]:
            session.close()

    def limit(self, most: int) -> None:
        """Takes no more connections at a time, and hangs up on idle ones above that."""
        self.most = most
        self.hang_up(max(0, len(self._open) - most))

    def has_too_many(self) -> bool:
        """Whether there are more connections than it takes."""
        return self.most is not None and len(self._open) > self.most

    def misbehaves(self, step: str, worker: int) -> str:
        """Returns what is to be done wrong at a step this time; nothing most of the time."""
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
            # The last is the end of the run; asyncio's streams would make a noise of it.
            with suppress(OSError, asyncio.IncompleteReadError, ssl.SSLError, ValueError, asyncio.CancelledError):
                await session.talk()
        finally:
            record.ended = time.time()
            self._open.discard(session)
            session.forget_recipient()
            session.close()


def _context(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context
