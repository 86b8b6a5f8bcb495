"""Sending mail: one SMTP connection per thread, kept and reused, with a time limit on every step."""

import smtplib
import ssl
import threading
import time
from email import policy
from email.message import EmailMessage
from email.utils import parseaddr

from email_validator import EmailNotValidError, validate_email

from outbox import logs
from outbox.errors import OutboxError, SkipRetry
from outbox.settings import WorkerSettings

IDLE_LIMIT = 30.0
"""Seconds after which a kept connection is checked before it is used again."""


class MailError(OutboxError):
    """The mail server did not take a mail, and may take it later."""


class Mailer:
    """A mail server, as all handlers of a worker use it. Safe to share between threads."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._server = settings.smtp_server
        self._timeout = settings.smtp_timeout
        self._sender = parseaddr(settings.mail_from)[1]
        self._local = threading.local()

    def send(self, message: EmailMessage) -> None:
        """Sends a mail to the address in its `To` header.

        Raises:
            SkipRetry: the server refuses this address for good.
            MailError: the server does not take the mail now, or does not like us.
            OSError, smtplib.SMTPException: the connection failed.
        """
        recipient = _envelope_address(str(message["To"]))
        connection = self._connection()
        try:
            self._transfer(connection, message, recipient)
        except (SkipRetry, MailError):
            self._reset(connection)
            raise
        except BaseException:  # the time limit of an attempt as well: what was said so far is unknown
            self._drop(connection)
            raise
        self._local.used_at = time.monotonic()

    def _transfer(self, smtp: smtplib.SMTP, message: EmailMessage, recipient: str) -> None:
        international = not (recipient.isascii() and self._sender.isascii())
        options = ["SMTPUTF8", "BODY=8BITMIME"] if international else []
        if international and not smtp.has_extn("smtputf8"):
            raise SkipRetry(f"the mail server cannot send to the international address {recipient}")
        content = message.as_bytes(policy=policy.SMTPUTF8 if international else policy.SMTP)

        code, text = smtp.mail(self._sender, options)
        if code != 250:
            self._refused("the sender", code, text)
        code, text = smtp.rcpt(recipient)
        if code not in (250, 251):
            if _is_final(code, text):
                raise SkipRetry(f"the mail server refuses {recipient} for good: {_reply(code, text)}")
            self._refused("the recipient", code, text)
        code, text = smtp.data(content)
        if code != 250:
            self._refused("the mail", code, text)

    @staticmethod
    def _refused(what: str, code: int, text: bytes) -> None:
        if code >= 500:
            # Nothing that a retry alone would mend, and nothing that is the recipient's fault: somebody must look.
            logs.get().error("mail server refuses us", refused=what, reply=_reply(code, text))
        raise MailError(f"the mail server does not take {what}: {_reply(code, text)}")

    def _connection(self) -> smtplib.SMTP:
        kept: smtplib.SMTP | None = getattr(self._local, "smtp", None)
        if kept is not None:
            if time.monotonic() - self._local.used_at < IDLE_LIMIT or self._is_alive(kept):
                return kept
            self._drop(kept)
        self._local.smtp = self._connect()
        return self._local.smtp

    def _connect(self) -> smtplib.SMTP:
        server = self._server
        context = ssl.create_default_context()
        smtp: smtplib.SMTP
        if server.security == "tls":
            smtp = smtplib.SMTP_SSL(server.host, server.port, timeout=self._timeout, context=context)
        else:
            smtp = smtplib.SMTP(server.host, server.port, timeout=self._timeout)
        try:
            if server.security == "starttls":
                smtp.starttls(context=context)
            smtp.ehlo_or_helo_if_needed()
            if server.user is not None and server.password is not None:
                smtp.login(server.user, server.password)
        except smtplib.SMTPAuthenticationError as error:
            smtp.close()
            code, text = error.smtp_code, error.smtp_error
            self._refused("the login", code, text if isinstance(text, bytes) else text.encode())
        except BaseException:
            smtp.close()
            raise
        return smtp

    @staticmethod
    def _is_alive(smtp: smtplib.SMTP) -> bool:
        try:
            return smtp.noop()[0] == 250
        except (OSError, smtplib.SMTPException):
            return False

    def _reset(self, smtp: smtplib.SMTP) -> None:
        try:
            if smtp.rset()[0] != 250:
                self._drop(smtp)
        except (OSError, smtplib.SMTPException):
            self._drop(smtp)

    def _drop(self, smtp: smtplib.SMTP) -> None:
        self._local.smtp = None
        smtp.close()


def _envelope_address(address: str) -> str:
    """Returns the address as the envelope carries it: the domain in ASCII, and all of it where that is possible."""
    try:
        valid = validate_email(address, check_deliverability=False)
    except EmailNotValidError as error:
        raise SkipRetry(f"the address {address!r} is not valid: {error}") from None
    return valid.ascii_email or valid.normalized


def _is_final(code: int, text: bytes) -> bool:
    """Whether a refused RCPT means that this address will never do.

    A 5xx says so, unless it is about us: 503 (sequence), 530 and 535 (login), or an enhanced code 5.7.x (policy:
    relaying denied, sender not allowed; RFC 3463, section 3.8).
    """
    return 500 <= code < 600 and code not in (503, 530, 535) and not text.startswith(b"5.7.")


def _reply(code: int, text: bytes) -> str:
    return f"{code} {text.decode(errors='replace')}"
