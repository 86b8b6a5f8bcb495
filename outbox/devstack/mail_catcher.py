"""A mail server that delivers nothing: it keeps each mail as a file and logs the link in it."""

import asyncio
import email
import email.policy
import os
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
        folder: made if need be; each mail is kept in it as `<time>-<recipient>.eml`.

    Yields:
        The SMTP_URL to send them to.

    Raises:
        OSError: no port can be had.
        StartError: the folder is another user's, or not safe from others.
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
            _Keeper(folder), hostname="localhost", data_size_limit=_LARGEST_MAIL, enable_SMTPUTF8=True, loop=loop
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


class _Keeper:
    """aiosmtpd's handler of what its clients say."""

    def __init__(self, folder: PrivateFolder) -> None:
        self._folder = folder

    async def handle_DATA(self, _: SMTP, __: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd's name for it
        content = envelope.content if isinstance(envelope.content, bytes) else (envelope.content or "").encode()
        recipient = envelope.rcpt_tos[0] if envelope.rcpt_tos else "nobody"
        file = _keep(self._folder, recipient, content)
        mail = email.message_from_bytes(content, policy=email.policy.default)
        logs.get().info(
            "caught a mail",
            to=", ".join(envelope.rcpt_tos),
            subject=str(mail["Subject"]),
            link=link(mail),
            file=str(file),
        )
        return "250 OK"


def link(mail: EmailMessage) -> str | None:
    """Returns the first verification link in a mail's text, or None."""
    body = mail.get_body(("plain", "html"))
    found = _LINK.search(str(body.get_content())) if body is not None else None
    return found[0] if found else None


def _keep(folder: PrivateFolder, recipient: str, content: bytes) -> Path:
    name = re.sub(r"[^A-Za-z0-9@._+-]", "_", recipient)[:100]
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{name}"
    # A program that watches the folder sees only whole mails.
    unfinished, file = f"{stem}.unfinished", f"{stem}.eml"
    with os.fdopen(folder.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as output:
        output.write(content)
    folder.rename(unfinished, file)
    return folder.path / file
