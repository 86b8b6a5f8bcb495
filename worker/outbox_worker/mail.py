"""Sending mail, and what becomes of a mail that is not taken."""

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
from outbox_worker.connections import IDLE, Connections
from outbox_worker.mail_errors import MailError, MailServerError
from outbox_worker.mail_server import MailServer, refusal
from outbox_worker.replies import CLOSING, Reply, fault_of, quoted
from outbox_worker.smtp import FINISHING_TIME, Smtp


class Mailer:
    """A mail server, as all handlers of a worker use it. Safe to share between threads."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._server = MailServer(settings)
        self._connections = Connections(self._server, settings.mail_connections)
        self._sender = deliverable(parseaddr(settings.mail_from)[1])

    @property
    def is_away(self) -> bool:
        """Whether the mail server is away, as far as is known."""
        return self._connections.is_away

    def close_idle(self, seconds: float = IDLE) -> None:
        """Closes the connections that no mail has needed for so many seconds."""
        self._connections.close_idle(seconds)

    def send(self, message: EmailMessage | Message) -> None:
        """Sends a mail; an `EmailMessage` goes to the address in its `To` header.

        Raises:
            SkipRetry: the server knows that this mailbox will never do, or it is no address.
            MailServerError: the server takes no mail now, whichever it is; nothing was sent.
            MailError: the server does not take this mail now, or the connection broke over it.
            TimeLimitError: the attempt's time is over; the mail is not sent.
        """
        if isinstance(message, EmailMessage):
            recipient = _envelope_address(str(message["To"]))
            content = message.as_bytes(policy=policy.SMTP if recipient.isascii() else policy.SMTPUTF8)
        else:
            recipient, content = _envelope_address(message.recipient), message.content
        smtp = self._begin(lambda smtp: self._offer(smtp, recipient), is_plain=recipient.isascii())
        try:
            self._transfer(smtp, content, recipient)
        except MailServerError as error:
            self._connections.refused(smtp, error)
            raise
        except (SkipRetry, MailError):
            self._connections.works()
            self._put_back(smtp)
            raise
        except (OSError, smtplib.SMTPException) as error:
            self._connections.drop(smtp)
            raise self._broken(error) from error
        except BaseException:  # what was said so far is unknown
            self._connections.drop(smtp)
            raise
        self._connections.works()
        self._connections.put_back(smtp)

    def _begin(self, offer: Callable[[Smtp], Reply], *, is_plain: bool = True) -> Smtp:
        """Returns a connection that has taken the sender, which `offer` tells it.

        A kept one may have been closed meanwhile, or the server may want no more mails on it: whatever it answers but
        yes, another decides.
        """
        began = time.monotonic()
        while True:
            smtp, is_new = self._connections.take()
            broke: Exception | None = None
            try:
                code, text = offer(smtp)
                if code == 250:
                    return smtp
            except MailError:
                self._connections.put_back(smtp)  # nothing was said
                raise
            except (OSError, smtplib.SMTPException) as error:
                broke = error
                self._connections.close_idle(0)  # they are no younger
            except BaseException:
                self._connections.drop(smtp)
                raise
            if not is_new and deadline.remaining():
                self._connections.drop(smtp)
                continue
            failed = (
                self._server.failed("the connection to it broke", broke, began)
                if broke
                else refusal("the sender" if is_plain else "an international address", code, text)
            )
            if not isinstance(failed, MailServerError):
                self._connections.drop(smtp)
                raise failed
            self._connections.refused(smtp, failed)
            if not deadline.remaining():
                raise failed

    def _offer(self, smtp: Smtp, recipient: str) -> Reply:
        """Sends the sender's address, and returns the answer.

        Where the server lets us, it says in the same breath what `_transfer` would say next, and finds answered
        there: of a mail's four waits for the server, two are left (RFC 2920).
        """
        options = [] if recipient.isascii() else ["SMTPUTF8", "BODY=8BITMIME"]
        if options and not smtp.has_extn("smtputf8"):
            logs.get().error(
                "mail server rejected our request", refused="an international address", reply="it offers no SMTPUTF8"
            )
            raise MailError("the mail server does not take an international address: it offers no SMTPUTF8")
        if not _pipelines(smtp):
            return smtp.mail(self._sender, options)
        mail = " ".join([f"MAIL FROM:<{self._sender}>", *options])
        smtp.send(f"{mail}\r\nRCPT TO:<{recipient}>\r\nDATA\r\n".encode())
        return smtp.getreply()

    def _transfer(self, smtp: Smtp, content: bytes, recipient: str) -> None:
        pipelines = _pipelines(smtp)
        code, text = smtp.getreply() if pipelines else smtp.rcpt(recipient)
        if code not in (250, 251):
            if pipelines and code != CLOSING:
                self._settle(smtp)
            if fault_of("the recipient", code, text) == "mailbox":
                raise SkipRetry(f"the mail server refuses {recipient} for good: {quoted(code, text)}")
            raise refusal("the recipient", code, text)
        code, text = smtp.getreply() if pipelines else smtp.docmd("DATA")
        if code != 354:
            if code < 400:
                smtp.close()  # it is an answer to something else
            raise refusal("the mail", code, text)
        smtp.send(_with_end(content))
        code, text = smtp.getreply(FINISHING_TIME)
        if code == CLOSING:
            raise smtplib.SMTPServerDisconnected(quoted(code, text))
        if code != 250:
            raise refusal("the mail", code, text)

    @staticmethod
    def _settle(smtp: Smtp) -> None:
        """Reads the answer to DATA of a refused mail; a server that would take it all the same is left."""
        with suppress(OSError, smtplib.SMTPException):
            if smtp.getreply()[0] != 354:
                return
        smtp.close()

    def _broken(self, error: Exception) -> MailError | TimeLimitError:
        """Returns what to raise for a connection that broke over a mail, or said nothing.

        The mail may be the reason, and may have been taken, so the attempt counts, unless no other connection takes our
        sender either.
        """
        if not deadline.remaining():
            return TimeLimitError("the attempt's time is over")
        broken = MailError(f"the mail server {self._server}: the connection to it broke: {one_line(error)}")
        try:
            smtp = self._begin(lambda smtp: smtp.mail(self._sender))
        except MailServerError as away:
            return away if self.is_away else broken
        except TimeLimitError:
            return broken
        self._connections.works()
        self._put_back(smtp)
        return broken

    def _put_back(self, smtp: Smtp) -> None:
        """Puts a connection back on which a mail was begun."""
        is_reset = False
        with suppress(OSError, smtplib.SMTPException, TimeLimitError):
            is_reset = smtp.rset()[0] == 250
        if is_reset:
            self._connections.put_back(smtp)
        else:
            self._connections.drop(smtp)


class AttemptMails:
    """The mails of one attempt.

    Once one of them is out, an attempt counts whatever comes: it would be sent again at each try, without an end.
    """

    def __init__(self, mailer: Mailer) -> None:
        self._mailer = mailer
        self._is_out = False

    def send(self, message: EmailMessage | Message) -> None:
        """Sends a mail, as `Mailer.send` does."""
        try:
            self._mailer.send(message)
        except MailServerError as error:
            if self._is_out:
                raise MailError(str(error)) from error
            raise
        self._is_out = True


_LABEL = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_PLAIN_ADDRESS = re.compile(rf"(?=.{{1,64}}@)[A-Za-z0-9_%+-]+(?:\.[A-Za-z0-9_%+-]+)*@{_LABEL}(?:\.{_LABEL})+")
"""Most addresses, which need no look at international names and quoted parts."""


def deliverable(address: str) -> str:
    """Returns an address with its domain in ASCII, as every mail server takes it; as it is where that cannot be."""
    if _PLAIN_ADDRESS.fullmatch(address):
        return address
    try:
        return validate_email(address, check_deliverability=False).ascii_email or address
    except EmailNotValidError:
        return address


def _envelope_address(address: str) -> str:
    """Returns the address as the envelope carries it: the domain in ASCII, and all of it where that is possible."""
    if _PLAIN_ADDRESS.fullmatch(address):
        return address
    try:
        valid = validate_email(address, check_deliverability=False)
    except EmailNotValidError as error:
        raise SkipRetry(f"the address {address!r} is not valid: {error}") from None
    return valid.ascii_email or valid.normalized


def _with_end(content: bytes) -> bytes:
    """Returns a mail as DATA takes it: a dot that begins a line is doubled, and one more ends it (RFC 5321, 4.5.2)."""
    ended = content if content.endswith(b"\r\n") else content + b"\r\n"
    return (b"\n" + ended).replace(b"\n.", b"\n..")[1:] + b".\r\n"


def _pipelines(smtp: Smtp) -> bool:
    return smtp.has_extn("pipelining")
