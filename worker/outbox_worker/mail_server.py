"""The mail server that the settings name: how a connection to it is made."""

import smtplib
import socket
import ssl
import time

from outbox.errors import TimeLimitError
from outbox.runtime import logs
from outbox.runtime.redaction import one_line
from outbox.runtime.settings import WorkerSettings
from outbox_worker import deadline
from outbox_worker.addresses import Address, Addresses, OwnName
from outbox_worker.mail_errors import MailError, MailServerError
from outbox_worker.replies import Refused, fault_of, quoted, status_of
from outbox_worker.smtp import SHORTEST, Smtp, SmtpOverTls

PATIENCE = 3.0
"""Seconds without an answer that are the server's fault, though the attempt had no more."""


class MailServer:
    """Where mails go to. Safe to share between threads."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._server = server = settings.smtp_server
        self._timeout = settings.smtp_timeout
        self._addresses = Addresses(server.host, server.port)
        self._own_name = OwnName(settings.smtp_helo)
        # One for all connections: reading the system's certificates takes longer than a mail.
        self._tls = None if server.security == "none" else ssl.create_default_context()

    def __str__(self) -> str:
        return f"{self._server.host}:{self._server.port}"

    def connect(self) -> Smtp:
        """Returns a connection that has said EHLO and has logged in.

        Raises:
            MailServerError: there is none to be had.
            TimeLimitError: the attempt has no time for it.
        """
        began = time.monotonic()
        try:
            return self._connect()
        except smtplib.SMTPAuthenticationError as error:
            raise refusal("the login", error.smtp_code, error.smtp_error) from error
        except smtplib.SMTPResponseException as error:
            raise refusal("the connection", error.smtp_code, error.smtp_error) from error
        except UnicodeEncodeError:  # its text would quote the password
            raise MailServerError("the user or password in SMTP_URL has characters that no login can carry") from None
        except (OSError, ValueError, TimeLimitError) as error:
            raise self.failed("it cannot be reached", error, began) from error

    def failed(self, how: str, error: Exception, began: float) -> MailServerError | TimeLimitError:
        """Returns what to raise for a server that has failed to answer since `began`, by the monotonic clock."""
        if not deadline.remaining() and time.monotonic() - began < PATIENCE:
            return TimeLimitError("the attempt's time is over")
        return MailServerError(f"the mail server {self}: {how}: {one_line(error)}")

    def _connect(self) -> Smtp:
        """Tries the server's addresses in turn.

        They share the time: one that is dead, or takes a connection and says nothing, leaves enough for the others, and
        is tried last the next time.

        Raises:
            OSError: the error of the last address that was tried; smtplib's errors are OSErrors.
            UnicodeError: the name of the server cannot be looked up, or the login cannot be sent.
            ValueError: the server's challenge in a login is none (not in base64, say).
        """
        left = deadline.begin_step(self._timeout)
        began = time.monotonic()
        addresses = self._addresses.find(left)
        left -= time.monotonic() - began
        failed: OSError = OSError(f"{self._server.host} has no address")
        for number, address in enumerate(addresses):
            behind = len(addresses) - number
            began = time.monotonic()
            try:
                opened = _open(address, min(left, deadline.remaining()) / behind)
                left -= time.monotonic() - began
                smtp = self._introduce(opened, min(self._timeout, deadline.remaining() / behind))
            except OSError as error:
                failed = error
                self._addresses.fails(address)
                if _is_refusal(error) or not deadline.remaining():
                    break  # another address would say the same, and of failed logins some servers count too many
            else:
                self._addresses.works(address)
                return smtp
        raise failed

    def _introduce(self, opened: socket.socket, timeout: float) -> Smtp:
        """Says EHLO and logs in on a connection, with so many seconds for each step."""
        server, name = self._server, self._own_name.on(opened)
        smtp = (
            SmtpOverTls(local_hostname=name, timeout=timeout, context=self._tls)
            if server.security == "tls"
            else Smtp(local_hostname=name, timeout=timeout)
        )
        try:
            smtp.begin(opened, server.host, server.port)
            if server.security == "starttls":
                smtp.starttls(context=self._tls)
            smtp.ehlo_or_helo_if_needed()
            if server.user is not None and server.password is not None:
                smtp.login(server.user, server.password)
        except BaseException:
            smtp.close()
            opened.close()
            raise
        smtp.timeout = self._timeout
        return smtp


def refusal(refused: Refused, code: int, text: bytes | str) -> MailError:
    """Returns what to raise for a refusal; one that names the mailbox is for the caller to tell."""
    # What a server says of a login may quote it, password and all.
    reply = status_of(code, text) if refused == "the login" else quoted(code, text)
    sentence = f"the mail server does not take {refused}: {reply}"
    if fault_of(refused, code, text if isinstance(text, bytes) else text.encode()) == "server":
        return MailServerError(sentence, refused, reply)
    if code >= 500:
        # A retry alone does not help, and the recipient is not at fault: an operator must look.
        logs.get().error("mail server rejected our request", refused=refused, reply=reply)
    return MailError(sentence)


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, smtplib.SMTPResponseException) and error.smtp_code >= 500


def _open(address: Address, seconds: float) -> socket.socket:
    opened = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        opened.settimeout(max(SHORTEST, seconds))
        opened.connect(address.sockaddr)
    except BaseException:
        opened.close()
        raise
    return opened
