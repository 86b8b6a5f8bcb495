"""Sending mail: one SMTP connection per thread, kept and reused, with a time limit on every step."""

import re
import smtplib
import threading
from contextlib import suppress
from email import policy
from email.message import EmailMessage
from email.utils import parseaddr
from typing import NoReturn

from email_validator import EmailNotValidError, validate_email

from outbox import deadline, logs
from outbox.errors import OutboxError, SkipRetry, TimeLimitError
from outbox.message import Message
from outbox.outage import one_line
from outbox.settings import WorkerSettings
from outbox.verification import masked
from worker.mail_server import MailServer
from worker.replies import Reply, is_final
from worker.smtp import FINISHING_TIME, Smtp


class MailError(OutboxError):
    """The mail server did not take a mail, and may take it later."""


class Mailer:
    """A mail server, as all handlers of a worker use it. Safe to share between threads."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._server = MailServer(settings)
        self._sender = deliverable(parseaddr(settings.mail_from)[1])
        self._local = threading.local()

    def send(self, message: EmailMessage | Message) -> None:
        """Sends a mail; an `EmailMessage` goes to the address in its `To` header.

        Raises:
            SkipRetry: the server knows that this mailbox will never do, or it is no address.
            MailError: the server does not take the mail now, or does not like us, or the connection broke.
            TimeLimitError: the attempt's time is over; the mail is not sent.
        """
        if isinstance(message, EmailMessage):
            recipient = _envelope_address(str(message["To"]))
            content = message.as_bytes(policy=policy.SMTP if recipient.isascii() else policy.SMTPUTF8)
        else:
            recipient, content = _envelope_address(message.recipient), message.content
        try:
            smtp = self._begin(recipient, ["SMTPUTF8", "BODY=8BITMIME"] if not recipient.isascii() else [])
            self._transfer(smtp, content, recipient)
        except (SkipRetry, MailError):
            self._reset()
            raise
        except (OSError, smtplib.SMTPException) as error:
            self._drop()
            raise self._failed("the connection to it broke", error) from error
        except BaseException:  # what was said so far is unknown
            self._drop()
            raise

    def _begin(self, recipient: str, options: list[str]) -> Smtp:
        """Returns a connection that has taken the sender.

        The kept one is tried first. The server may have closed it meanwhile, or may want no more mails on it:
        whatever it answers but yes, a new one decides.
        """
        kept: Smtp | None = getattr(self._local, "smtp", None)
        if kept is not None:
            with suppress(OSError, smtplib.SMTPException):
                if self._offer(kept, recipient, options)[0] == 250:
                    return kept
            self._drop()
        self._local.smtp = smtp = self._connect()
        if options and not smtp.has_extn("smtputf8"):
            self._refused("an international address", None, b"no SMTPUTF8 among what it offers")
        code, text = self._offer(smtp, recipient, options)
        if code != 250:
            if _pipelines(smtp):
                self._drop()  # with its answers to the rest
            self._refused("the sender", code, text)
        return smtp

    def _offer(self, smtp: Smtp, recipient: str, options: list[str]) -> Reply:
        """Says whom the mail is from, and returns the answer.

        Where the server lets us, it says in the same breath what `_transfer` would say next, and finds answered
        there: of a mail's four waits for the server, two are left (RFC 2920).
        """
        if not _pipelines(smtp):
            return smtp.mail(self._sender, options)
        mail = " ".join([f"MAIL FROM:<{self._sender}>", *options])
        smtp.send(f"{mail}\r\nRCPT TO:<{recipient}>\r\nDATA\r\n".encode())
        return smtp.getreply()

    def _transfer(self, smtp: Smtp, content: bytes, recipient: str) -> None:
        pipelines = _pipelines(smtp)
        code, text = smtp.getreply() if pipelines else smtp.rcpt(recipient)
        if code not in (250, 251):
            if pipelines:
                self._settle(smtp)
            if is_final(code, text):
                raise SkipRetry(f"the mail server refuses {recipient} for good: {_reply(code, text)}")
            self._refused("the recipient", code, text)
        code, text = smtp.getreply() if pipelines else smtp.docmd("DATA")
        if code != 354:
            if code < 400:
                self._drop()  # it is an answer to something else
            self._refused("the mail", code, text)
        smtp.send(_with_end(content))
        code, text = smtp.getreply(FINISHING_TIME)
        if code != 250:
            self._refused("the mail", code, text)

    def _settle(self, smtp: Smtp) -> None:
        """Reads the answer to DATA of a refused mail; a server that would take it all the same is left."""
        with suppress(OSError, smtplib.SMTPException):
            if smtp.getreply()[0] != 354:
                return
        self._drop()

    @staticmethod
    def _refused(what: str, code: int | None, text: bytes) -> NoReturn:
        if code is None or code >= 500:
            # Nothing that a retry alone would mend, and nothing that says it is the recipient's fault.
            logs.get().error("mail server refuses us", refused=what, reply=_reply(code, text))
        raise MailError(f"the mail server does not take {what}: {_reply(code, text)}")

    def _connect(self) -> Smtp:
        try:
            return self._server.connect()
        except smtplib.SMTPAuthenticationError as error:
            self._refused("the login", error.smtp_code, _bytes(error.smtp_error))
        except smtplib.SMTPResponseException as error:
            self._refused("the connection", error.smtp_code, _bytes(error.smtp_error))
        except UnicodeEncodeError:  # its text would quote the password
            raise MailError("the user or password in SMTP_URL has characters that no login can carry") from None
        except (OSError, UnicodeError) as error:
            raise self._failed("it cannot be reached", error) from error

    def _failed(self, how: str, error: Exception) -> MailError | TimeLimitError:
        """Returns what to raise for a connection that failed."""
        if not deadline.remaining():  # it was given up because of that
            return TimeLimitError("the attempt's time is over")
        return MailError(f"the mail server {self._server}: {how}: {one_line(error)}")

    def _reset(self) -> None:
        smtp: Smtp | None = getattr(self._local, "smtp", None)
        if smtp is None:
            return
        is_reset = False
        with suppress(OSError, smtplib.SMTPException, TimeLimitError):
            is_reset = smtp.rset()[0] == 250
        if not is_reset:
            self._drop()

    def _drop(self) -> None:
        smtp: Smtp | None = getattr(self._local, "smtp", None)
        self._local.smtp = None
        if smtp is not None:
            smtp.close()


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


def _reply(code: int | None, text: bytes) -> str:
    said = " ".join(masked(text.decode(errors="replace")).split())[:300]
    return said if code is None else f"{code} {said}"


def _bytes(text: bytes | str) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
