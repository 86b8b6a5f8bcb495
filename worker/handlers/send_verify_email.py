"""Sends a new user the link that verifies the address."""

import hashlib
import hmac
from collections.abc import Mapping
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import formatdate, parseaddr
from html import escape
from typing import Any
from urllib.parse import urlencode

from psycopg.rows import dict_row
from psycopg_pool import PoolTimeout

from outbox import Context, SkipRetry, handler, postgres
from outbox.queries import query
from outbox.settings import WorkerSettings
from outbox.tasks import SEND_VERIFY_EMAIL, SendVerifyEmail
from outbox.verification import secret_code
from worker.mail import deliverable


@handler(SEND_VERIFY_EMAIL)
def send_verify_email(payload: SendVerifyEmail, context: Context) -> Mapping[str, object]:
    """Sends the mail; every attempt sends the same link under the same Message-ID.

    Raises:
        SkipRetry: the user is gone, or the mail server refuses the address for good.
        MailError, OSError, smtplib.SMTPException: the mail server does not take the mail now.
    """
    try:
        user, verification = _open_verification(payload.username, context)
    except PoolTimeout:
        raise
    except postgres.AWAY:  # the connection broke in the middle, and nothing is sent yet: another may serve
        user, verification = _open_verification(payload.username, context)
    if verification is None:
        # An earlier attempt sent the mail and died before it could say so; the user was quicker than the retry.
        return {"email": user["email"], "already_verified": True}
    code = secret_code(context.settings.secret_key, verification["id"], user["username"], verification["email"])
    parameters = urlencode({"email_id": verification["id"], "secret_code": code})
    link = f"{context.settings.public_url}/v1/verify_email?{parameters}"
    recipient, sent_at = verification["email"], verification["now"]
    context.send(compose(context.settings, context.row, recipient, user["full_name"], link, sent_at=sent_at))
    return {"email": verification["email"]}


def _open_verification(username: str, context: Context) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns the user, and the verification unless the user needs none any more."""
    with context.database.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
        user = cursor.execute(query("verification_recipient"), {"username": username}).fetchone()
        if user is None:
            raise SkipRetry(f"the user {username} is gone")
        if user["is_email_verified"]:
            return user, None
        verification = cursor.execute(
            query("open_verification"),
            {
                "outbox_id": context.row,
                "username": user["username"],
                "email": user["email"],
                "lifetime": context.settings.link_lifetime,
            },
        ).fetchone()
    assert verification is not None
    return user, verification


def compose(
    settings: WorkerSettings, row: int, recipient: str, full_name: str, link: str, *, sent_at: float
) -> EmailMessage:
    """Returns the mail. `EmailMessage` refuses line breaks in headers, and the name is in the body alone.

    Args:
        settings: for the sender and the link's lifetime.
        row: the outbox row, which the Message-ID is derived from.
        recipient: the address.
        full_name: of the user.
        link: what the button opens.
        sent_at: seconds since the epoch, by Postgres' clock.
    """
    minutes = max(1, round(settings.link_lifetime / 60))
    lifetime = "1 minute" if minutes == 1 else f"{minutes} minutes"
    message = EmailMessage()
    name, sender = parseaddr(settings.mail_from)
    message["From"] = Address(name, addr_spec=deliverable(sender))
    message["To"] = deliverable(recipient)
    message["Subject"] = "Please verify your email address"
    message["Date"] = formatdate(sent_at)
    message["Message-ID"] = message_id(settings, row)
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(
        f"Hello {full_name},\n\n"
        f"thank you for signing up. Open this link to verify your email address:\n\n{link}\n\n"
        f"It works for {lifetime}. If you did not sign up, ignore this mail.\n",
        cte="quoted-printable",
    )
    message.add_alternative(
        f"<!doctype html><html><body><p>Hello {escape(full_name)},</p>"
        f"<p>thank you for signing up.</p>"
        f'<p><a href="{escape(link)}">Verify your email address</a></p>'
        f"<p>The link works for {lifetime}. If you did not sign up, ignore this mail.</p></body></html>\n",
        subtype="html",
        cte="quoted-printable",
    )
    return message


def message_id(settings: WorkerSettings, row: int) -> str:
    """Returns the row's Message-ID: the same at every attempt, and no other deployment's."""
    digest = hmac.new(settings.secret_key.encode(), f"message-id\0{row}".encode(), hashlib.sha256).hexdigest()
    domain = deliverable(parseaddr(settings.mail_from)[1]).rpartition("@")[2]
    return f"<outbox.{row}.{digest[:20]}@{domain}>"
