"""Sends mails, and decides what a failure means for the attempt and for the connection."""

import re
import smtplib
import time
from collections.abc import Callable
from contextlib import suppress
from email import policy
from email.message import EmailMessage
from email.utils import parseaddr

from email_validator import EmailNotValidError, validate_email

from outbox.errors import SkipRetry, TimeLimitError
from outbox.message import Message
from outbox.runtime import logs
from outbox.runtime.redaction import one_line
from outbox.runtime.settings import WorkerSettings
from outbox_worker import deadline
from outbox_worker.connections import IDLE_LIMIT, Connections
from outbox_worker.mail_errors import MailError, MailServerError
from outbox_worker.mail_server import MailServer, rejection
from outbox_worker.replies import CLOSING, Reply, fault_of, quoted
from outbox_worker.smtp import FINISHING_TIME, Smtp


class Mailer:
    """Sends mails over the worker's shared connections to the mail server. Safe to share between threads."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._server = MailServer(settings)
        self._connections = Connections(self._server, settings.mail_connections)
        self._sender = with_ascii_domain(parseaddr(settings.mail_from)[1])

    @property
    def is_away(self) -> bool:
        """Whether the mail server was away when it was last tried."""
        return self._connections.is_away

    def close_idle(self, seconds: float = IDLE_LIMIT) -> None:
        """Closes connections that were idle for `seconds`."""
        self._connections.close_idle(seconds)

    def send(self, message: EmailMessage | Message) -> None:
        """Sends a mail; an `EmailMessage` goes to the address in its `To` header.

        Raises:
            SkipRetry: the address is invalid, or the server rejected this mailbox permanently.
            MailServerError: the server accepts no mail now, or no connection is free.
            MailError: the server does not accept this mail now, or the connection broke during it.
            TimeLimitError: the attempt's time is over.
        """
        if isinstance(message, EmailMessage):
            recipient = _envelope_address(str(message["To"]))
            content = message.as_bytes(policy=policy.SMTP if recipient.isascii() else policy.SMTPUTF8)
        else:
            recipient, content = _envelope_address(message.recipient), message.content
        smtp = self._begin_mail(lambda smtp: self._send_envelope(smtp, recipient), is_ascii=recipient.isascii())
        try:
            self._transfer(smtp, content, recipient)
        except MailServerError as error:
            self._connections.drop_rejected(smtp, error)
            raise
        except (SkipRetry, MailError):
            self._connections.mark_available()
            self._reset(smtp)
            raise
        except (OSError, smtplib.SMTPException) as error:
            self._connections.drop(smtp)
            raise self._diagnose(error) from error
        except BaseException:  # the state of the SMTP session is unknown
            self._connections.drop(smtp)
            raise
        self._connections.mark_available()
        self._connections.put_back(smtp)

    def _begin_mail(self, send_sender: Callable[[Smtp], Reply], *, is_ascii: bool = True) -> Smtp:
        """Returns a connection on which the server accepted the sender.

        The server may have closed an idle connection, or may accept no more mails on it. So a failure on a connection
        that is not new is followed by a try on another one.
        """
        while True:
            smtp, is_new = self._connections.take()
            began = time.monotonic()
            broken: Exception | None = None
            try:
                code, text = send_sender(smtp)
                if code == 250:
                    return smtp
            except MailError:
                self._connections.put_back(smtp)  # nothing was sent on it
                raise
            except (OSError, smtplib.SMTPException) as error:
                broken = error
                self._connections.close_idle(0)  # those have been idle for longer
            except BaseException:
                self._connections.drop(smtp)
                raise
            if not is_new and deadline.remaining():
                self._connections.drop(smtp)
                continue
            failure = (
                self._server.failure("the connection to it broke", broken, began)
                if broken
                else rejection("the sender" if is_ascii else "an international address", code, text)
            )
            if not isinstance(failure, MailServerError):
                self._connections.drop(smtp)
                raise failure
            self._connections.drop_rejected(smtp, failure)
            if not deadline.remaining():
                raise failure

    def _send_envelope(self, smtp: Smtp, recipient: str) -> Reply:
        """Sends MAIL FROM, and returns the reply.

        If the server supports pipelining (RFC 2920), RCPT and DATA follow at once, and `_transfer` reads their replies:
        a mail waits for the server twice instead of four times.
        """
        options = [] if recipient.isascii() else ["SMTPUTF8", "BODY=8BITMIME"]
        if options and not smtp.has_extn("smtputf8"):
            logs.get().error(
                "mail server rejected our request", refused="an international address", reply="it offers no SMTPUTF8"
            )
            raise MailError("the mail server rejected an international address: it offers no SMTPUTF8")
        if not _has_pipelining(smtp):
            return smtp.mail(self._sender, options)
        mail = " ".join([f"MAIL FROM:<{self._sender}>", *options])
        smtp.send(f"{mail}\r\nRCPT TO:<{recipient}>\r\nDATA\r\n".encode())
        return smtp.getreply()

    def _transfer(self, smtp: Smtp, content: bytes, recipient: str) -> None:
        """Completes a mail whose sender was accepted."""
        has_pipelining = _has_pipelining(smtp)
        code, text = smtp.getreply() if has_pipelining else smtp.rcpt(recipient)
        if code not in (250, 251):
            if has_pipelining and code != CLOSING:
                self._read_data_reply(smtp)
            if fault_of("the recipient", code, text) == "mailbox":
                raise SkipRetry(f"the mail server rejected {recipient} permanently: {quoted(code, text)}")
            raise rejection("the recipient", code, text)
        code, text = smtp.getreply() if has_pipelining else smtp.docmd("DATA")
        if code != 354:
            if code < 400:
                smtp.close()  # the reply belongs to another command
            raise rejection("the mail", code, text)
        smtp.send(_dot_stuffed(content))
        code, text = smtp.getreply(FINISHING_TIME)
        if code == CLOSING:
            raise smtplib.SMTPServerDisconnected(quoted(code, text))
        if code != 250:
            raise rejection("the mail", code, text)

    @staticmethod
    def _read_data_reply(smtp: Smtp) -> None:
        """Reads the reply to DATA after a rejected recipient. Closes the connection if it is 354 or missing."""
        with suppress(OSError, smtplib.SMTPException):
            if smtp.getreply()[0] != 354:
                return
        smtp.close()

    def _diagnose(self, error: Exception) -> MailError | TimeLimitError:
        """Returns the error to raise for a connection that broke or timed out during a mail.

        The mail may be the cause, and the server may have accepted it. So the attempt counts, unless the server accepts
        our sender on no other connection.
        """
        if not deadline.remaining():
            return TimeLimitError("the attempt's time is over")
        broken = MailError(f"the mail server {self._server}: the connection to it broke: {one_line(error)}")
        try:
            smtp = self._begin_mail(lambda smtp: smtp.mail(self._sender))
        except MailServerError as away:
            return away if self.is_away else broken
        except TimeLimitError:
            return broken
        self._connections.mark_available()
        self._reset(smtp)
        return broken

    def _reset(self, smtp: Smtp) -> None:
        """Aborts the mail on a connection with RSET, and puts the connection back."""
        is_reset = False
        with suppress(OSError, smtplib.SMTPException, TimeLimitError):
            is_reset = smtp.rset()[0] == 250
        if is_reset:
            self._connections.put_back(smtp)
        else:
            self._connections.drop(smtp)


class AttemptMails:
    """Sends the mails of one attempt.

    Once one of them is sent, the attempt counts whatever happens: otherwise that mail would be sent again at every
    attempt, without end.
    """

    def __init__(self, mailer: Mailer) -> None:
        self._mailer = mailer
        self._has_sent = False

    def send(self, message: EmailMessage | Message) -> None:
        """Sends a mail, as `Mailer.send` does."""
        try:
            self._mailer.send(message)
        except MailServerError as error:
            if self._has_sent:
                raise MailError(str(error)) from error
            raise
        self._has_sent = True


_LABEL = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_PLAIN_ADDRESS = re.compile(rf"(?=.{{1,64}}@)[A-Za-z0-9_%+-]+(?:\.[A-Za-z0-9_%+-]+)*@{_LABEL}(?:\.{_LABEL})+")
"""Matches most addresses: those with neither international characters nor quoted parts need no full parse."""


def with_ascii_domain(address: str) -> str:
    """Returns an address with its domain in ASCII, which every mail server accepts, if it has such a form."""
    if _PLAIN_ADDRESS.fullmatch(address):
        return address
    try:
        return validate_email(address, check_deliverability=False).ascii_email or address
    except EmailNotValidError:
        return address


def _envelope_address(address: str) -> str:
    """Returns the address for the envelope: in ASCII if it has such a form.

    Raises:
        SkipRetry: the address is invalid.
    """
    if _PLAIN_ADDRESS.fullmatch(address):
        return address
    try:
        valid = validate_email(address, check_deliverability=False)
    except EmailNotValidError as error:
        raise SkipRetry(f"the address {address!r} is not valid: {error}") from None
    return valid.ascii_email or valid.normalized


def _dot_stuffed(content: bytes) -> bytes:
    """Returns a mail as it is sent after DATA: leading dots doubled, and a final line with a dot (RFC 5321, 4.5.2)."""
    ended = content if content.endswith(b"\r\n") else content + b"\r\n"
    return (b"\n" + ended).replace(b"\n.", b"\n..")[1:] + b".\r\n"


def _has_pipelining(smtp: Smtp) -> bool:
    return smtp.has_extn("pipelining")
