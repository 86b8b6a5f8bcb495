"""Sending mails: logins and TLS, connections that are kept, and international addresses."""

import socket
import threading
from typing import Any

import pytest
import trustme
from structlog.testing import capture_logs

from outbox import SkipRetry
from outbox.message import Message
from outbox_worker.mail_errors import MailError
from tests.support.mailbox import LOGIN, Mailbox, free_port, serve_mailbox, serve_script, tls
from tests.support.mailing import close, mail, mailer
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.usefixtures("pipelining"),
    pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS"),
]


def test_a_mail_without_login_and_tls_arrives(mailbox: Mailbox) -> None:
    """smtp:// without a login; a line with a single dot does not end the mail."""
    sender = mailer(mailbox.url)
    sender.send(mail())
    (received,) = mailbox.to("alice@example.com")
    assert received.get_content().splitlines() == ["Hello", ".", "Dot"]
    close(sender)


@pytest.mark.parametrize("scheme", ["smtp", "smtps", "smtp+starttls"])
def test_logins_over_every_scheme(scheme: str, authority: trustme.CA) -> None:
    """With and without TLS, with a percent-encoded user and password in the URL."""
    all_options: dict[str, dict[str, Any]] = {
        "smtp": {"auth_require_tls": False},
        "smtps": {"ssl_context": tls(authority), "auth_require_tls": False},
        "smtp+starttls": {"tls_context": tls(authority), "require_starttls": True},
    }
    with serve_mailbox(**all_options[scheme], **LOGIN) as mailbox:
        sender = mailer(f"{scheme}://user%40x:p%3A%2Fw@127.0.0.1:{mailbox.port}", smtp_timeout=5)
        sender.send(mail())
        assert len(mailbox.to("alice@example.com")) == 1
        close(sender)


@pytest.mark.parametrize("scheme", ["smtps", "smtp+starttls"])
@pytest.mark.parametrize("flaw", ["another name", "another authority"])
def test_a_wrong_certificate_is_refused(scheme: str, flaw: str, authority: trustme.CA) -> None:
    """A server that cannot prove its name gets neither the mail nor the password; the mail is tried again later."""
    context = tls(authority, "mail.example.org") if flaw == "another name" else tls(trustme.CA())
    options: dict[str, Any] = {"ssl_context": context} if scheme == "smtps" else {"tls_context": context}
    with serve_mailbox(**options, **LOGIN, auth_require_tls=False) as mailbox:
        with pytest.raises(MailError, match="cannot be reached: SSLCertVerificationError"):
            mailer(f"{scheme}://user%40x:p%3A%2Fw@127.0.0.1:{mailbox.port}", smtp_timeout=5).send(mail())
        assert not mailbox.mails


def test_a_server_without_starttls_gets_no_mail(mailbox: Mailbox) -> None:
    """A man in the middle who removes STARTTLS gets neither the mail nor the password."""
    with pytest.raises(Exception, match="STARTTLS"):
        mailer(mailbox.url.replace("smtp:", "smtp+starttls:")).send(mail())
    assert not mailbox.mails


def test_a_connection_is_kept_and_shared(mailbox: Mailbox) -> None:
    """Mails that are sent one at a time use one connection, even from several threads."""
    sender = mailer(mailbox.url)
    for _ in range(5):
        sender.send(mail())
    thread = threading.Thread(target=lambda: sender.send(mail()))
    thread.start()
    thread.join(5)
    assert (mailbox.connections, len(mailbox.mails)) == (1, 6)
    close(sender)


def test_a_connection_that_the_server_closed_is_replaced() -> None:
    """A server that restarts, or closes an idle connection, costs no attempt."""
    port = free_port()
    sender = mailer(f"smtp://127.0.0.1:{port}")
    for _ in range(2):
        with serve_mailbox(port) as mailbox:
            sender.send(mail())
            assert (len(mailbox.mails), mailbox.connections) == (1, 1)
    close(sender)


def test_a_connection_that_accepts_no_more_mails_is_replaced() -> None:
    """A server that limits the mails per connection (421) gets the next one on a new connection."""
    with serve_script(close_after=1) as server:
        sender = mailer(server.url)
        sender.send(mail())
        sender.send(mail())
        eventually(lambda: (server.mails, server.connections) == (2, 2))
        close(sender)


def test_a_server_that_is_down_is_tried_again() -> None:
    """A refused connection is not a SkipRetry, and the error names the server for the operator."""
    port = free_port()
    with pytest.raises(MailError, match=f"mail server 127.0.0.1:{port}: it cannot be reached: ConnectionRefusedError"):
        mailer(f"smtp://127.0.0.1:{port}").send(mail())


def test_an_address_family_that_the_system_does_not_know_is_skipped(
    mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host without IPv6, for example, the next address is tried."""
    unknown = (999, socket.SOCK_STREAM, 6, "", ("::1", mailbox.port))
    known = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", mailbox.port))
    monkeypatch.setattr("outbox_worker.addresses.socket.getaddrinfo", lambda *_, **__: [unknown, known])
    sender = mailer(mailbox.url)
    sender.send(mail())
    assert len(mailbox.mails) == 1
    close(sender)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r\n."])
def test_a_mail_needs_no_line_end(mailbox: Mailbox, end: bytes) -> None:
    """The server recognizes the end of a mail, whatever its last bytes are."""
    sender = mailer(mailbox.url)
    sender.send(Message("alice@example.com", b"Subject: Hello\r\n\r\nHello" + end))
    sender.send(mail())
    assert [mail.get_content().split()[0] for _, mail in mailbox.mails] == ["Hello", "Hello"]
    close(sender)


def test_an_international_address() -> None:
    """It is sent with SMTPUTF8; a server without it is an error in the log, and the mail is tried again."""
    with serve_mailbox(enable_SMTPUTF8=True) as mailbox:
        sender = mailer(mailbox.url)
        sender.send(mail("jürgen@example.com"))
        sender.send(mail("alice@example.com"))
        assert [address for address, _ in mailbox.mails] == ["jürgen@example.com", "alice@example.com"]
        close(sender)
    with serve_mailbox(enable_SMTPUTF8=False) as mailbox:
        sender = mailer(mailbox.url)
        with capture_logs() as lines, pytest.raises(MailError, match="international address: it offers no SMTPUTF8"):
            sender.send(mail("jürgen@example.com"))
        assert [(line["log_level"], line["event"]) for line in lines] == [("error", "mail server rejected our request")]
        sender.send(mail("alice@example.com"))
        with pytest.raises(MailError, match="international address: it offers no SMTPUTF8"):
            sender.send(mail("jürgen@example.com"))
        assert len(mailbox.mails) == 1
        close(sender)


def test_an_international_domain_needs_nothing_special() -> None:
    """The envelope has its ASCII form, for recipient and sender, so the server needs no SMTPUTF8."""
    with serve_mailbox(enable_SMTPUTF8=False) as mailbox:
        sender = mailer(mailbox.url, mail_from="no-reply@exämple.com")
        sender.send(mail("user@exämple.com"))
        assert [address for address, _ in mailbox.mails] == ["user@xn--exmple-cua.com"]
        close(sender)


@pytest.mark.parametrize("address", ["not an address", "a@example.com, b@example.com", "<>", "a@b@c"])
def test_an_invalid_address_is_final(address: str, mailbox: Mailbox) -> None:
    """No retry can help, and the server is not asked."""
    with pytest.raises(SkipRetry, match="not valid"):
        mailer(mailbox.url).send(mail(address))
    assert mailbox.connections == 0
