"""Opens connections to the mail server that the settings name."""

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
from outbox_worker.smtp import MIN_TIMEOUT, Smtp, SmtpOverTls

PATIENCE = 3.0
"""Seconds without a reply after which the server is at fault, even if the attempt's time is over too."""


class MailServer:
    """The mail server of the settings. Safe to share between threads."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._server = server = settings.smtp_server
        self._timeout = settings.smtp_timeout
        self._addresses = Addresses(server.host, server.port)
        self._own_name = OwnName(settings.smtp_helo)
        # Shared by all connections: reading the system's certificates takes longer than sending a mail.
        self._tls = None if server.security == "none" else ssl.create_default_context()

    def __str__(self) -> str:
        return f"{self._server.host}:{self._server.port}"

    def connect(self) -> Smtp:
        """Opens a connection, sends EHLO and logs in.

        Raises:
            MailServerError: the server cannot be reached, or rejects the connection or the login.
            TimeLimitError: the attempt has no time left.
        """
        began = time.monotonic()
        try:
            return self._connect()
        except smtplib.SMTPAuthenticationError as error:
            raise rejection("the login", error.smtp_code, error.smtp_error) from error
        except smtplib.SMTPResponseException as error:
            raise rejection("the connection", error.smtp_code, error.smtp_error) from error
        except UnicodeEncodeError:  # its text quotes the password
            raise MailServerError(
                "the user or password in SMTP_URL has non-ASCII characters, which no login can carry"
            ) from None
        except (OSError, ValueError, TimeLimitError) as error:
            raise self.failure("it cannot be reached", error, began) from error

    def failure(self, how: str, error: Exception, began: float) -> MailServerError | TimeLimitError:
        """Returns the error to raise for a connection that broke or could not be opened.

        Args:
            how: what failed.
            error: the cause.
            began: when the step began, in seconds of the monotonic clock.
        """
        if not deadline.remaining() and time.monotonic() - began < PATIENCE:
            return TimeLimitError("the attempt's time is over")
        return MailServerError(f"the mail server {self}: {how}: {one_line(error)}")

    def _connect(self) -> Smtp:
        """Tries the server's addresses in turn.

        They share the time that is left: an address that is dead, or that accepts a connection and does not reply,
        leaves enough time for the others. Next time it is tried last.

        Raises:
            OSError: the error of the last address that was tried; smtplib's errors are OSErrors.
            UnicodeError: the name of the server cannot be looked up, or the login cannot be sent.
            ValueError: the server's challenge in a login is malformed (not in base64, for example).
        """
        left = deadline.begin_step(self._timeout)
        began = time.monotonic()
        addresses = self._addresses.find(left)
        left -= time.monotonic() - began
        last_error: OSError = OSError(f"{self._server.host} has no address")
        for number, address in enumerate(addresses):
            addresses_left = len(addresses) - number
            began = time.monotonic()
            try:
                opened = _open(address, min(left, deadline.remaining()) / addresses_left)
                left -= time.monotonic() - began
                smtp = self._log_in(opened, min(self._timeout, deadline.remaining() / addresses_left))
            except OSError as error:
                last_error = error
                self._addresses.mark_failed(address)
                if _is_permanent(error) or not deadline.remaining():
                    break  # another address would reply the same, and some servers lock out repeated failed logins
            else:
                self._addresses.mark_reached(address)
                return smtp
        raise last_error

    def _log_in(self, opened: socket.socket, timeout: float) -> Smtp:
        """Sends EHLO and logs in on an open socket; `timeout` is the limit of each step in seconds."""
        server, name = self._server, self._own_name.for_connection(opened)
        smtp = (
            SmtpOverTls(local_hostname=name, timeout=timeout, context=self._tls)
            if server.security == "tls"
            else Smtp(local_hostname=name, timeout=timeout)
        )
        try:
            smtp.read_greeting(opened, server.host, server.port)
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


def rejection(refused: Refused, code: int, text: bytes | str) -> MailError:
    """Returns the error to raise for a reply that rejects something, and logs a 5xx about a mail.

    The caller handles replies that name the mailbox; `Connections` logs those that are the server's fault.
    """
    # A reply to a login may quote the password.
    reply = status_of(code, text) if refused == "the login" else quoted(code, text)
    sentence = f"the mail server rejected {refused}: {reply}"
    if fault_of(refused, code, text if isinstance(text, bytes) else text.encode()) == "server":
        return MailServerError(sentence, refused, reply)
    if code >= 500:
        # A retry does not help, and the recipient is not at fault: an operator must act.
        logs.get().error("mail server rejected our request", refused=refused, reply=reply)
    return MailError(sentence)


def _is_permanent(error: Exception) -> bool:
    return isinstance(error, smtplib.SMTPResponseException) and error.smtp_code >= 500


def _open(address: Address, seconds: float) -> socket.socket:
    opened = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        opened.settimeout(max(MIN_TIMEOUT, seconds))
        opened.connect(address.sockaddr)
    except BaseException:
        opened.close()
        raise
    return opened
