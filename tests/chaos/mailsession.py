"""Serves one connection to the mail server."""

import asyncio
import contextlib
import email
import re
import socket
import ssl
import struct
import time
from typing import TYPE_CHECKING

from tests.chaos.evidence import Mail, Overlap, Session

if TYPE_CHECKING:
    from tests.chaos.mailserver import MailServer

_LATENCY = (0.02, 0.15)
"""Seconds to accept a mail, as on a real server, so that a worker can be killed in the middle."""

_SLOW = 1.6
"""Seconds to accept a mail when the server is slow; within the workers' time limit."""

_REPLIES = {
    "4xx": {
        "connect": "421 4.3.2 not now",
        "ehlo": "421 4.3.2 not now",
        "starttls": "454 4.7.0 no TLS at the moment",
        "auth": "454 4.7.0 the user database is away",
        "mail": "451 4.3.0 try again later",
        "rcpt": "450 4.2.1 the mailbox is busy",
        "data": "451 4.3.0 try again later",
        "dot": "452 4.3.1 no room",
    },
    "5xx": {
        "connect": "554 5.3.2 no mail server here",
        "ehlo": "550 5.7.1 not you",
        "starttls": "501 5.5.4 no TLS",
        "auth": "535 5.7.8 wrong password",
        "mail": "550 5.7.1 this sender may not send",
        "rcpt": "550 5.7.1 relaying denied",
        "data": "554 5.7.0 no mails from you",
        "dot": "554 5.6.0 looks like spam",
    },
}


class Ended(OSError):  # noqa: N818 - not an error
    """The server ends the session."""


class MailSession:
    """Serves one client until either side disconnects."""

    def __init__(
        self, server: "MailServer", record: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._server = server
        self._record = record
        self._reader, self._writer = reader, writer
        self._is_secure = False
        self._recipient = ""
        self._is_begun = False
        """Whether it has accepted the sender of a mail."""
        self._last: Mail | None = None

    def close(self) -> None:
        """Closes the connection."""
        self._writer.close()

    @property
    def is_idle(self) -> bool:
        """Whether it is between two mails."""
        return not self._is_begun

    def forget_recipient(self) -> None:
        """Records that this session is not sending to any recipient."""
        if self._server.sessions_by_recipient.get(self._recipient) is self._record:
            del self._server.sessions_by_recipient[self._recipient]
        self._recipient = ""
        self._is_begun = False

    async def serve(self) -> None:
        """Serves the client.

        Raises:
            Ended, OSError, EOFError: the session is over.
        """
        if self._server.has_too_many_sessions():
            await self._say("421 4.7.0 too many connections")
            return
        await self._reply("connect", "220 ready")
        while line := await self._reader.readline():
            if self._last is not None:
                self._last.followed = True
                self._last = None
            verb, _, rest = line.decode(errors="replace").strip().partition(" ")
            command = getattr(self, f"_{verb.lower()}", None)
            if command is None:
                await self._say("502 5.5.2 what?")
            else:
                await command(rest)
            if self.is_idle and self._server.has_too_many_sessions():
                return

    async def _ehlo(self, _: str) -> None:
        extensions = ["AUTH PLAIN" if self._is_secure else "STARTTLS", "8BITMIME"]
        await self._reply("ehlo", "\r\n".join(["250-mail.example.com", f"250-{extensions[0]}", f"250 {extensions[1]}"]))

    _helo = _ehlo

    async def _starttls(self, _: str) -> None:
        if not await self._reply("starttls", "220 go ahead"):
            return
        bad = self._misbehaves("handshake")
        if bad == "garbage":
            self._writer.write(b"\x16\x03\x03 this is not what you think it is\r\n" * 3)
            await self._hang()
        if bad in ("hang", "reset"):
            await self._refuse(bad, "handshake")
        await self._secure(self._server.certificates[bad or "right"])

    async def _secure(self, context: ssl.SSLContext) -> None:
        # Not StreamWriter.start_tls, which fails in odd ways if the client disconnects during the handshake.
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport = await loop.start_tls(self._writer.transport, protocol, context, server_side=True)
        if transport is None:
            raise Ended
        protocol.connection_made(transport)
        self._reader, self._writer = reader, asyncio.StreamWriter(transport, protocol, reader, loop)
        self._is_secure = True

    async def _auth(self, _: str) -> None:
        await self._reply("auth", "235 2.7.0 welcome")

    async def _mail(self, _: str) -> None:
        self._is_begun = await self._reply("mail", "250 2.1.0 OK")

    async def _rcpt(self, rest: str) -> None:
        match = re.search(r"<(.*)>", rest)
        recipient = match[1].lower() if match else ""
        bad = self._misbehaves("rcpt")
        if bad == "address":
            self._server.refused_addresses.setdefault(recipient, time.time())
        if recipient in self._server.refused_addresses:
            await self._say("550 5.1.1 no such user here")
            return
        if bad:
            await self._refuse(bad, "rcpt")
            return
        other = self._server.sessions_by_recipient.get(recipient)
        if other is not None:
            workers = (other.worker, self._record.worker)
            self._server.overlaps.append(Overlap(recipient, time.time(), workers))
        self._server.sessions_by_recipient[recipient] = self._record
        self._recipient = recipient
        await self._say("250 2.1.5 OK")

    async def _data(self, _: str) -> None:
        if not await self._reply("data", "354 go on"):
            self.forget_recipient()
            return
        if bad := self._misbehaves("body"):
            await self._reader.read(200)  # only a part of it
            await self._refuse(bad, "body")
        content = await self._reader.readuntil(b"\r\n.\r\n")
        bad = self._misbehaves("dot")
        if bad == "slow":
            await asyncio.sleep(_SLOW)
            bad = ""
        await asyncio.sleep(self._server.draw.uniform(*_LATENCY))
        if self._reader.at_eof() or self._writer.is_closing():
            raise Ended
        if bad and not bad.startswith("take"):
            await self._refuse(bad, "dot")
            self.forget_recipient()
            return
        mail = self._accept(content)
        self.forget_recipient()
        if bad:
            await self._refuse(bad.removeprefix("take and "), "dot")
        mail.answered = time.time()
        await self._say("250 2.0.0 taken")
        self._last = mail

    def _accept(self, content: bytes) -> Mail:
        # The package's older interface takes a tenth of the newer one's 3 ms: thousands may come at once.
        message = email.message_from_bytes(content)
        texts = (part for part in message.walk() if part.get_content_type() == "text/plain")
        body = next((part.get_payload(decode=True) for part in texts), b"")
        link = re.search(rb"https?://\S+", body if isinstance(body, bytes) else b"")
        mail = Mail(
            recipient=self._recipient,
            message_id=str(message["Message-ID"]).strip(),
            link=link[0].decode() if link else "",
            worker=self._record.worker,
            session=self._record.number,
            accepted=time.time(),
        )
        self._server.mails.append(mail)
        self._server.accepted.set()
        return mail

    async def _rset(self, _: str) -> None:
        self.forget_recipient()
        await self._say("250 2.0.0 OK")

    async def _noop(self, _: str) -> None:
        await self._say("250 2.0.0 OK")

    async def _quit(self, _: str) -> None:
        await self._reply("quit", "221 2.0.0 bye")
        raise Ended

    async def _reply(self, step: str, good: str) -> bool:
        """Answers a step, and returns whether the answer was the good one.

        Raises:
            Ended: the server misbehaved, and the session is over.
        """
        if bad := self._misbehaves(step):
            await self._refuse(bad, step)
            return False
        await self._say(good)
        return True

    def _misbehaves(self, step: str) -> str:
        return self._server.misbehaves(step, self._record.worker)

    async def _refuse(self, bad: str, step: str) -> None:
        if bad == "hang":
            await self._hang()
        if bad == "reset":
            linger = struct.pack("ii", 1, 0)
            with contextlib.suppress(OSError):
                self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._writer.transport.abort()
            raise Ended
        reply = _REPLIES[bad][step]
        await self._say(reply)
        if reply.startswith("421") or step == "connect":
            raise Ended

    async def _hang(self) -> None:
        while await self._reader.read(4096):
            pass
        raise Ended

    async def _say(self, reply: str) -> None:
        self._writer.write(reply.encode() + b"\r\n")
        await self._writer.drain()
