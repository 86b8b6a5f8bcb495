"""Sends a new user a mail with the link that verifies the address."""

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
from outbox_worker.mail import with_ascii_domain


class VerificationError(OutboxError):
    """Another row with the same id took over the verification while it was opened."""


class Recipient(NamedTuple):
    """An outbox row and the user who gets its mail."""

    row_id: int
    username: str


class Opened(NamedTuple):
    """A row of the statement `open_verifications`: a user and the verification of an outbox row."""

    outbox_id: int
    full_name: str | None
    email: str | None
    """None if another transaction has locked the user."""
    is_email_verified: bool | None
    id: int | None
    """Of the verification; None if the user needs none, or if it is used, or for another user or address."""
    now: float
    """Seconds since the epoch, by Postgres' clock."""


def verification_mail(settings: WorkerSettings) -> Handler[SendVerifyEmail]:
    """Returns the handler, which gets the settings here: a `Context` has none."""
    return handler(SEND_VERIFY_EMAIL)(_VerificationMail(settings).send)


class _VerificationMail:
    """Sends verification mails, and opens the verifications of many in one statement. Shared by all handler threads."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._coalesced: Coalescer[Recipient, Opened | None] = Coalescer()
        self._put_off = Tally()
        """Counts mails that were put off, by reason."""

    def send(self, payload: SendVerifyEmail, context: Context) -> Mapping[str, object]:
        """Sends the mail, with the same link and Message-ID at every attempt.

        Raises:
            SkipRetry: the user does not exist, or the mail server rejected the mailbox permanently.
            VerificationError: another row with the same id took over the verification.
            NotNowError: another transaction has locked the user, or Postgres cannot open the verification now.
            MailError: the mail server does not accept the mail now.
        """
        opened = self._open(Recipient(context.row_id, payload.username), context)
        if opened is None:
            raise SkipRetry(f"the user {payload.username} does not exist")
        if opened.email is None:
            raise self._not_now("locked", f"the user {payload.username} is locked by another transaction")
        if opened.is_email_verified:
            # An earlier attempt sent the mail, its outcome was lost, and the user clicked before this retry.
            return {"email": opened.email, "already_verified": True}
        if opened.id is None:
            raise VerificationError(f"row {context.row_id} has no verification: another row with this id took it over")
        code = secret_code(self._settings.secret_key, opened.id, payload.username, opened.email)
        parameters = urlencode({"email_id": opened.id, "secret_code": code})
        link = f"{self._settings.public_url}/v1/verify_email?{parameters}"
        context.send(
            compose(
                self._settings,
                context.row_id,
                opened.email,
                opened.full_name or "",
                link,
                username=payload.username,
                sent_at=opened.now,
            )
        )
        return {"email": opened.email}

    def _open(self, recipient: Recipient, context: Context) -> Opened | None:
        try:
            return self._coalesced(recipient, partial(self._open_all, context))
        except NotNowError:
            raise  # no connection is free for this row either
        except (psycopg.Error, TimeLimitError):
            # Another row, or another attempt's time limit, may be the cause; or the connection broke. No mail was sent.
            return self._open_alone(recipient, context)

    def _open_alone(self, recipient: Recipient, context: Context) -> Opened | None:
        try:
            # Handlers' sessions have the database's default isolation level. A stricter one requires retries after
            # conflicts, which go on while the attempt has time.
            while True:
                with suppress(psycopg.errors.SerializationFailure):
                    return self._open_all(context, [recipient])[0]
        except (*postgres.AWAY, TimeLimitError) as error:
            if isinstance(error, NotNowError):
                raise
            # A lock or an outage, or waiting for them took all of the attempt's time.
            why = f"the verification cannot be opened now: {one_line(error)}"
            raise self._not_now(type(error).__name__, why) from error

    def _not_now(self, reason: str, why: str) -> NotNowError:
        if times := self._put_off.count(reason):
            logs.get().warning("mail put off", why=why, times=times)
        return NotNowError(why)

    def _open_all(self, context: Context, recipients: Sequence[Recipient]) -> list[Opened | None]:
        usernames = dict(recipients)
        parameters = {
            "outbox_ids": list(usernames),
            "usernames": list(usernames.values()),
            "lifetime": self._settings.link_lifetime,
        }
        with context.database.connection() as connection, connection.cursor(row_factory=named(Opened)) as cursor:
            connection.autocommit = True  # nearly always one statement: saves the round trips of BEGIN and COMMIT
            by_row = _open_verifications(cursor, parameters)
            if stale := [
                row for row, opened in by_row.items() if opened.id is None and opened.is_email_verified is False
            ]:
                # Used, for an earlier address, or for another user (after a restore): the mail needs another one.
                logs.get().warning("detached verification", rows=stale)
                with connection.transaction():
                    connection.execute(query("detach_verifications"), parameters)
                    by_row = _open_verifications(cursor, parameters)
        return [by_row.get(recipient.row_id) for recipient in recipients]


def _open_verifications(cursor: Cursor[Opened], parameters: Mapping[str, object]) -> dict[int, Opened]:
    cursor.execute(query("open_verifications"), parameters)
    return {opened.outbox_id: opened for opened in cursor}


def compose(
    settings: WorkerSettings, row_id: int, recipient: str, full_name: str, link: str, *, username: str, sent_at: float
) -> Message:
    """Returns the mail. No line break gets into a header, and the user's name is only in the body.

    The mail names the account that a click confirms: someone who signs up with another person's address knows its
    password.

    Args:
        settings: for the sender, the service's host and the link's lifetime.
        row_id: the outbox row's id.
        recipient: the user's address.
        full_name: the user's name.
        link: the verification link; the Message-ID is derived from it and the row.
        username: the name of the account.
        sent_at: seconds since the epoch, by Postgres' clock.

    Raises:
        ValueError: the address has a control character in it.
    """
    minutes = max(1, round(settings.link_lifetime / 60))
    lifetime = "1 minute" if minutes == 1 else f"{minutes} minutes"
    account = f"the account {username} at {urlsplit(settings.public_url).hostname} was created with this address"
    warning = "If you did not sign up, ignore this mail: someone else has the password of this account."
    return alternatives(
        with_ascii_domain(recipient),
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
    """Returns a mail's Message-ID: the same at every attempt with the same link, and unique to this deployment.

    The row's id alone is not enough: ids repeat after a restore, and a mail that repeats the Message-ID of another is
    discarded as its copy.
    """
    digest = hmac.new(
        settings.secret_key.encode(), f"message-id\0{row_id}\0{link}".encode(), hashlib.sha256
    ).hexdigest()
    return f"<outbox.{row_id}.{digest[:20]}@{_sender(settings.mail_from)[1]}>"


@lru_cache
def _sender(mail_from: str) -> tuple[str, str]:
    """Returns the value of the `From` header, encoded if needed, and the domain of its address."""
    name, address = parseaddr(mail_from)
    message = EmailMessage(policy=policy.SMTP.clone(max_line_length=None))
    message["From"] = Address(name, addr_spec=with_ascii_domain(address))
    return message.as_string().rstrip().removeprefix("From: "), with_ascii_domain(address).rpartition("@")[2]
