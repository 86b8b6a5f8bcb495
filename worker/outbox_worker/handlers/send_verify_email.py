"""Sends a new user the link that verifies the address."""

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from contextlib import suppress
from email import policy
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import formatdate, parseaddr
from functools import lru_cache, partial
from html import escape
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit

import psycopg
from psycopg import Cursor

from outbox import Context, SkipRetry, handler
from outbox.errors import NotNowError, OutboxError, TimeLimitError
from outbox.handler import Handler
from outbox.message import Message, alternatives
from outbox.queries import query
from outbox.row import named
from outbox.runtime import logs, postgres
from outbox.runtime.redaction import one_line
from outbox.runtime.settings import WorkerSettings
from outbox.runtime.tally import Tally
from outbox.signup.secret_code import secret_code
from outbox.signup.send_verify_email import SEND_VERIFY_EMAIL, SendVerifyEmail
from outbox_worker.coalescer import Coalescer
from outbox_worker.mail import deliverable


class VerificationError(OutboxError):
    """The outbox row's verification was given to another row while it was opened."""


class Recipient(NamedTuple):
    """The user whom a row's mail goes to."""

    row_id: int
    username: str


class Opened(NamedTuple):
    """A row of the statement `open_verifications`: a user, and the verification of an outbox row."""

    outbox_id: int
    full_name: str | None
    email: str | None
    """None where another transaction has the user locked."""
    is_email_verified: bool | None
    id: int | None
    """Of the verification; None where the user needs none, or another row has it."""
    now: float
    """Seconds since the epoch, by Postgres' clock."""


def verification_mail(settings: WorkerSettings) -> Handler[SendVerifyEmail]:
    """Returns the handler. It alone knows the settings that link and sender need: contexts have none."""
    return handler(SEND_VERIFY_EMAIL)(_VerificationMail(settings).send)


class _VerificationMail:
    """The handler, which opens the verifications of many mails in one statement. Shared by all handler threads."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._together: Coalescer[Recipient, Opened | None] = Coalescer()
        self._put_off = Tally()
        """Mails that were put off, by reason."""

    def send(self, payload: SendVerifyEmail, context: Context) -> Mapping[str, object]:
        """Sends the mail; every attempt sends the same link under the same Message-ID.

        Raises:
            SkipRetry: the user is gone, or the mail server says that the mailbox will never do.
            VerificationError: another row has taken this one's verification.
            NotNowError: another transaction has the user locked, or Postgres cannot open the verification now.
            MailError: the mail server does not take the mail now.
        """
        found = self._open(Recipient(context.row_id, payload.username), context)
        if found is None:
            raise SkipRetry(f"the user {payload.username} is gone")
        if found.email is None:
            raise self._not_now("locked", f"the user {payload.username} is locked by another transaction")
        if found.is_email_verified:
            # An earlier attempt sent the mail and died before it could say so; the user was quicker than the retry.
            return {"email": found.email, "already_verified": True}
        if found.id is None:
            raise VerificationError(f"row {context.row_id} has no verification: another row has taken its id meanwhile")
        code = secret_code(self._settings.secret_key, found.id, payload.username, found.email)
        parameters = urlencode({"email_id": found.id, "secret_code": code})
        link = f"{self._settings.public_url}/v1/verify_email?{parameters}"
        context.send(
            compose(
                self._settings,
                context.row_id,
                found.email,
                found.full_name or "",
                link,
                username=payload.username,
                sent_at=found.now,
            )
        )
        return {"email": found.email}

    def _open(self, recipient: Recipient, context: Context) -> Opened | None:
        try:
            return self._together(recipient, partial(self._open_all, context))
        except NotNowError:
            raise  # nobody gets a connection
        except (psycopg.Error, TimeLimitError):
            # It may be another row's fault or the end of another's time, or the connection broke, and nothing is sent.
            return self._open_alone(recipient, context)

    def _open_alone(self, recipient: Recipient, context: Context) -> Opened | None:
        try:
            # Handlers' sessions have the isolation level that the database gives them. A stricter one means to try
            # conflicts again, while the attempt has time.
            while True:
                with suppress(psycopg.errors.SerializationFailure):
                    return self._open_all(context, [recipient])[0]
        except (*postgres.AWAY, TimeLimitError) as error:
            if isinstance(error, NotNowError):
                raise
            # A lock, an outage, or all of the attempt's time spent on waiting for them.
            why = f"the verification cannot be opened now: {one_line(error)}"
            raise self._not_now(type(error).__name__, why) from error

    def _not_now(self, kind: str, why: str) -> NotNowError:
        if times := self._put_off.count(kind):
            logs.get().warning("mail put off", why=why, times=times)
        return NotNowError(why)

    def _open_all(self, context: Context, recipients: Sequence[Recipient]) -> list[Opened | None]:
        by_row = dict(recipients)
        wanted = {
            "outbox_ids": list(by_row),
            "usernames": list(by_row.values()),
            "lifetime": self._settings.link_lifetime,
        }
        with context.database.connection() as connection, connection.cursor(row_factory=named(Opened)) as cursor:
            connection.autocommit = True  # one statement nearly always: it needs no round trips to begin and to commit
            opened = _executed(cursor, wanted)
            if stale := [row for row, found in opened.items() if found.id is None and found.is_email_verified is False]:
                # Another user's, as after a restore, or for an address that was changed: it must not be taken for ours.
                logs.get().warning("detached verification", rows=stale)
                with connection.transaction():
                    connection.execute(query("detach_verifications"), wanted)
                    opened = _executed(cursor, wanted)
        return [opened.get(recipient.row_id) for recipient in recipients]


def _executed(cursor: Cursor[Opened], wanted: Mapping[str, object]) -> dict[int, Opened]:
    cursor.execute(query("open_verifications"), wanted)
    return {found.outbox_id: found for found in cursor}


def compose(
    settings: WorkerSettings, row_id: int, recipient: str, full_name: str, link: str, *, username: str, sent_at: float
) -> Message:
    """Returns the mail. No line break gets into a header, and the name is in the body alone.

    It says which account a click confirms: a person who signs up with another's address knows its password.

    Args:
        settings: for the sender, the service's host and the link's lifetime.
        row_id: the outbox row's.
        recipient: the address.
        full_name: of the user.
        link: what the button opens; the Message-ID is derived from it and the row.
        username: the account.
        sent_at: seconds since the epoch, by Postgres' clock.

    Raises:
        ValueError: the address has a linefeed in it.
    """
    minutes = max(1, round(settings.link_lifetime / 60))
    lifetime = "1 minute" if minutes == 1 else f"{minutes} minutes"
    account = f"the account {username} at {urlsplit(settings.public_url).hostname} was created with this address"
    warning = "If you did not sign up, ignore this mail: somebody else has the account's password."
    return alternatives(
        deliverable(recipient),
        {
            "From": _sender(settings.mail_from)[0],
            "Subject": "Please verify your email address",
            "Date": formatdate(sent_at),
            "Message-ID": message_id(settings, row_id, link),
            "Auto-Submitted": "auto-generated",
        },
        text=(
            f"Hello {full_name},\n\n"
            f"{account}. Open this link to confirm that it is yours:\n\n{link}\n\n"
            f"It works for {lifetime}. {warning}\n"
        ),
        html=(
            f"<!doctype html><html><body><p>Hello {escape(full_name)},</p>"
            f"<p>{escape(account)}. Open this link to confirm that it is yours:</p>"
            f'<p><a href="{escape(link)}">Verify your email address</a></p>'
            f"<p>The link works for {lifetime}. {warning}</p></body></html>\n"
        ),
    )


def message_id(settings: WorkerSettings, row_id: int, link: str) -> str:
    """Returns a mail's Message-ID: the same at every attempt with the same link, and no other deployment's.

    The row alone would not do: its id comes again after a restore, and a mail that bears the Message-ID of an earlier
    one is thrown away as its copy.
    """
    digest = hmac.new(
        settings.secret_key.encode(), f"message-id\0{row_id}\0{link}".encode(), hashlib.sha256
    ).hexdigest()
    return f"<outbox.{row_id}.{digest[:20]}@{_sender(settings.mail_from)[1]}>"


@lru_cache
def _sender(mail_from: str) -> tuple[str, str]:
    """Returns the `From` header's value, encoded where that is needed, and the address' domain."""
    name, address = parseaddr(mail_from)
    message = EmailMessage(policy=policy.SMTP.clone(max_line_length=None))
    message["From"] = Address(name, addr_spec=deliverable(address))
    return message.as_string().rstrip().removeprefix("From: "), deliverable(address).rpartition("@")[2]
