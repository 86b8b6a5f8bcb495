"""`python -m bench.plain_rq`: the alternative without an outbox: RQ's SimpleWorker and a function that sends mail."""

import os
import smtplib
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from functools import cache
from html import escape

import redis
from rq import SimpleWorker

from outbox.runtime.settings import WorkerSettings

QUEUE = "plain"


def send(number: int, recipient: str, full_name: str) -> None:
    """Sends the mail that our handler sends, over the one connection of the process, without reading a database."""
    link = f"{_settings().public_url}/v1/verify_email?email_id={number}&secret_code={'0' * 64}"
    _connection().send_message(_compose(recipient, full_name, link))


def _compose(recipient: str, full_name: str, link: str) -> EmailMessage:
    message = EmailMessage()
    message["From"] = _settings().mail_from
    message["To"] = recipient
    message["Subject"] = "Please verify your email address"
    message["Date"] = formatdate()
    message["Message-ID"] = make_msgid(domain="example.com")
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(
        f"Hello {full_name},\n\n"
        f"thank you for signing up. Open this link to verify your email address:\n\n{link}\n\n"
        f"It works for 15 minutes. If you did not sign up, ignore this mail.\n"
    )
    message.add_alternative(
        f"<!doctype html><html><body><p>Hello {escape(full_name)},</p>"
        f"<p>thank you for signing up.</p>"
        f'<p><a href="{escape(link)}">Verify your email address</a></p>'
        f"<p>The link works for 15 minutes. If you did not sign up, ignore this mail.</p></body></html>\n",
        subtype="html",
    )
    return message


@cache
def _settings() -> WorkerSettings:
    return WorkerSettings.from_environment()


@cache
def _connection() -> smtplib.SMTP:
    server = _settings().smtp_server
    return smtplib.SMTP(server.host, server.port, timeout=10)


def main() -> None:
    """Runs the worker until SIGTERM."""
    with redis.Redis.from_url(os.environ["REDIS_URL"]) as client:
        SimpleWorker([QUEUE], connection=client).work(logging_level="WARNING")


if __name__ == "__main__":
    main()
