"""Runs a mail server that delivers nothing: it saves each mail to a file and logs the link in it."""

import asyncio
import email
import email.policy
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path

from aiosmtpd.smtp import SMTP, Envelope, Session

from outbox.devstack.private_files import PrivateFolder, private_folder
from outbox.runtime import logs

_LARGEST_MAIL = 10 * 2**20
"""Bytes."""
_LINK = re.compile(r"https?://\S*verify_email\S*")


@contextmanager
def catch_mails(folder: Path) -> Iterator[str]:
    """Catches mails on a free port of 127.0.0.1, in a thread, until the block is left.

    Args:
        folder: created if necessary; each mail is saved in it as `<time>-<recipient>.eml`.

    Yields:
        The SMTP_URL of the server.

    Raises:
        OSError: no port is free.
        StartError: the folder belongs to another user or is not safe from other users.
    """
    with private_folder(folder) as private, _listening(private) as url:
        yield url


@contextmanager
def _listening(folder: PrivateFolder) -> Iterator[str]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="mail catcher", daemon=True)
    thread.start()

    def connection() -> SMTP:
        return SMTP(
            _Handler(folder), hostname="localhost", data_size_limit=_LARGEST_MAIL, enable_SMTPUTF8=True, loop=loop
        )

    async def close(server: asyncio.Server) -> None:
        server.close()
        open_connections = asyncio.all_tasks() - {asyncio.current_task()}
        for task in open_connections:
            task.cancel()
        await asyncio.gather(*open_connections, return_exceptions=True)

    try:
        listening = loop.create_server(connection, "127.0.0.1", 0)
        server = asyncio.run_coroutine_threadsafe(listening, loop).result(10)
        try:
            yield f"smtp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            asyncio.run_coroutine_threadsafe(close(server), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


class _Handler:
    """aiosmtpd's handler of SMTP commands."""

    def __init__(self, folder: PrivateFolder) -> None:
        self._folder = folder

    async def handle_DATA(self, _: SMTP, __: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd requires this name
        content = envelope.content if isinstance(envelope.content, bytes) else (envelope.content or "").encode()
        recipient = envelope.rcpt_tos[0] if envelope.rcpt_tos else "nobody"
        file = _save(self._folder, recipient, content)
        mail = email.message_from_bytes(content, policy=email.policy.default)
        logs.get().info(
            "caught a mail",
            to=", ".join(envelope.rcpt_tos),
            subject=str(mail["Subject"]),
            link=verification_link(mail),
            file=str(file),
        )
        return "250 OK"


def verification_link(mail: EmailMessage) -> str | None:
    """Returns the first verification link in a mail's text, or None."""
    body = mail.get_body(("plain", "html"))
    match = _LINK.search(str(body.get_content())) if body is not None else None
    return match[0] if match else None


def _save(folder: PrivateFolder, recipient: str, content: bytes) -> Path:
    safe_recipient = re.sub(r"[^A-Za-z0-9@._+-]", "_", recipient)[:100]
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{safe_recipient}.eml"
    folder.write(name, content)
    return folder.path / name
