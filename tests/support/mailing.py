"""Mailers and mails for tests."""

import time
from collections.abc import Callable
from contextvars import copy_context
from email.message import EmailMessage
from typing import Any

from outbox.runtime.settings import WorkerSettings
from outbox_worker import deadline
from outbox_worker.mail import Mailer
from outbox_worker.mail_errors import MailServerError
from tests.support.waiting import eventually


def mailer(url: str, **changes: Any) -> Mailer:
    """Returns a mailer for a server; `changes` are settings."""
    return Mailer(
        WorkerSettings.model_validate(
            {
                "database_url": "postgresql://nowhere/none",
                "redis_url": "redis://nowhere",
                "smtp_server": url,
                "mail_from": "Sign-up <no-reply@example.com>",
                "public_url": "http://localhost",
                "secret_key": "k" * 32,
                "smtp_timeout": 0.5,
                **changes,
            }
        )
    )


def mail(to: str = "alice@example.com") -> EmailMessage:
    """Returns a small mail."""
    message = EmailMessage()
    message["From"] = "no-reply@example.com"
    message["To"] = to
    message["Subject"] = "Hello"
    message.set_content("Hello\n.\nDot\n")
    return message


def close(*mailers: Mailer) -> None:
    """Closes the idle connections of mailers."""
    for each in mailers:
        each.close_idle(0)


def send_when_back(sender: Mailer) -> None:
    """Sends a mail as soon as a server that was away is tried again."""

    def is_sent() -> bool:
        try:
            sender.send(mail())
        except MailServerError:
            return False
        return True

    eventually(is_sent, 5, "the mail is sent")


def within(seconds: float, send: Callable[[], None]) -> None:
    """Calls `send` in an attempt with so many seconds left."""

    def limited() -> None:
        deadline.limit(time.monotonic() + seconds)
        send()

    copy_context().run(limited)
