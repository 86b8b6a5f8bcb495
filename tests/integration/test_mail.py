"""Sending mail: every kind of server, connections that are kept, and servers that misbehave at every step."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

import pytest
import trustme
from aiosmtpd.smtp import AuthResult
from structlog.testing import capture_logs

from outbox import SkipRetry
from outbox.errors import TimeLimitError
from outbox.message import Message
from outbox_worker.mail_errors import MailError, MailServerError
from tests.support import mailbox as servers
from tests.support.mailbox import Mailbox, free_port, serve_mailbox, serve_script, tls
from tests.support.mailing import close, mail, mailer, send_when_back, within
from tests.support.waiting import eventually


def login(*args: Any) -> AuthResult:
    """Lets one user in."""
    data = args[-1]
    return AuthResult(success=(data.login, data.password) == (b"user@x", b"p:/w"), handled=False)


@pytest.fixture(autouse=True, params=[True, False], ids=["pipelined", "one by one"])
def _pipelining(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with both kinds of servers."""
    monkeypatch.setattr(servers, "PIPELINING", request.param)


LOGIN: dict[str, Any] = {"authenticator": login, "auth_required": True}


def test_plain(mailbox: Mailbox) -> None:
    """smtp:// without a login; a line with a single dot ends nothing."""
    sender = mailer(mailbox.url)
    sender.send(mail())
    (received,) = mailbox.to("alice@example.com")
    assert received.get_content().splitlines() == ["Hello", ".", "Dot"]
    close(sender)


@pytest.mark.parametrize("scheme", ["smtp", "smtps", "smtp+starttls"])
def test_logins_over_every_scheme(scheme: str, authority: trustme.CA) -> None:
    """With and without TLS, with a user and password that are percent-encoded in the URL."""
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
    """Neither the mail nor the password is sent to somebody who is not who they should be; tried again later."""
    context = tls(authority, "mail.example.org") if flaw == "another name" else tls(trustme.CA())
    options: dict[str, Any] = {"ssl_context": context} if scheme == "smtps" else {"tls_context": context}
    with serve_mailbox(**options, authenticator=login, auth_require_tls=False) as mailbox:
        with pytest.raises(MailError, match="cannot be reached: SSLCertVerificationError"):
            mailer(f"{scheme}://user%40x:p%3A%2Fw@127.0.0.1:{mailbox.port}", smtp_timeout=5).send(mail())
        assert not mailbox.mails


def test_a_server_without_starttls_is_told_nothing(mailbox: Mailbox) -> None:
    """Somebody in between who takes STARTTLS away gets no mail and no password."""
    with pytest.raises(Exception, match="STARTTLS"):
        mailer(mailbox.url.replace("smtp:", "smtp+starttls:")).send(mail())
    assert not mailbox.mails


def test_a_connection_is_kept_and_shared(mailbox: Mailbox) -> None:
    """Many mails are one connection, whichever threads they come from, as long as one mail is sent at a time."""
    sender = mailer(mailbox.url)
    for _ in range(5):
        sender.send(mail())
    thread = threading.Thread(target=lambda: sender.send(mail()))
    thread.start()
    thread.join(5)
    assert (mailbox.connections, len(mailbox.mails)) == (1, 6)
    close(sender)


def test_a_connection_that_was_closed_meanwhile_is_replaced() -> None:
    """A server that has gone and come back, or has closed an idle connection, costs no mail its attempt."""
    port = free_port()
    sender = mailer(f"smtp://127.0.0.1:{port}")
    for _ in range(2):
        with serve_mailbox(port) as mailbox:
            sender.send(mail())
            assert (len(mailbox.mails), mailbox.connections) == (1, 1)
    close(sender)


def test_a_connection_that_has_served_its_time_is_replaced() -> None:
    """A server that takes only so many mails on one connection (421, 452) gets the next on another."""
    with serve_script(close_after=1) as server:
        sender = mailer(server.url)
        sender.send(mail())
        sender.send(mail())
        eventually(lambda: (server.mails, server.connections) == (2, 2))
        close(sender)


def test_a_server_that_is_down_is_tried_again() -> None:
    """Connection refused is no SkipRetry, and the error names the server: an operator knows where to look."""
    port = free_port()
    with pytest.raises(MailError, match=f"mail server 127.0.0.1:{port}: it cannot be reached: ConnectionRefusedError"):
        mailer(f"smtp://127.0.0.1:{port}").send(mail())


@pytest.mark.parametrize(
    ("step", "reply"),
    [
        ("rcpt_reply", "450 4.2.1 busy"),
        ("rcpt_reply", "452 4.2.2 full"),
        ("rcpt_reply", "451 4.7.1 greylisted"),
        ("data_reply", "452 4.3.1 no room"),
        ("data_reply", "421 4.3.2 not this one"),
    ],
)
def test_a_4xx_for_a_mail_is_tried_again(mailbox: Mailbox, step: str, reply: str) -> None:
    """With the server's words, and quietly; the next mail goes through."""
    sender = mailer(mailbox.url)
    setattr(mailbox, step, reply)
    with capture_logs() as lines, pytest.raises(MailError, match=reply) as caught:
        sender.send(mail())
    assert not isinstance(caught.value, MailServerError)
    assert not lines
    setattr(mailbox, step, "250 OK")
    sender.send(mail())
    assert len(mailbox.mails) == 1
    close(sender)


@pytest.mark.parametrize(
    ("step", "reply"),
    [
        ("mail_reply", "421 4.3.2 shutting down"),
        ("mail_reply", "452 4.3.1 no room"),
        ("mail_reply", "451 4.3.0 try again later"),
        ("mail_reply", "450 4.7.1 too many mails"),
        ("rcpt_reply", "421 4.7.0 slow down"),
        ("rcpt_reply", "450 4.1.8 <no-reply@example.com>: Sender address rejected: Domain not found"),
        ("rcpt_reply", "550 5.1.7 <no-reply@example.com>: Sender address rejected: undeliverable address"),
        ("rcpt_reply", "550 5.1.8 <no-reply@example.com>: Sender address rejected: Domain not found"),
        ("mail_reply", "550 5.7.1 sender not allowed"),
        ("mail_reply", "550 5.1.1 a sender is no recipient"),
        ("mail_reply", "530 log in first"),
    ],
)
def test_what_is_said_to_all_mails_is_an_outage(mailbox: Mailbox, step: str, reply: str) -> None:
    """One line when it begins, and one more if somebody must mend it; one when the server takes a mail again."""
    sender = mailer(mailbox.url)
    setattr(mailbox, step, reply)
    with capture_logs() as lines:
        for _ in range(5):
            with pytest.raises(MailServerError, match=reply.split(":", maxsplit=1)[0]):
                sender.send(mail())
            assert sender.is_away
        setattr(mailbox, step, "250 OK")
        send_when_back(sender)
    shouts = ["mail server rejected our request"] if reply.startswith("5") else []
    assert [line["event"] for line in lines] == [*shouts, "mail server is away", "mail server is back"]
    assert reply in str(lines)
    assert not sender.is_away
    assert len(mailbox.mails) == 1
    close(sender)


@pytest.mark.parametrize(
    "reply",
    [
        "550 5.1.1 no such user",
        "550 5.1.2 no such domain",
        "501 5.1.3 bad address",
        "551 5.1.6 moved",
        "556 5.1.10 accepts no mail",
        "550 5.2.1 disabled",
    ],
)
def test_a_5xx_that_names_the_mailbox_is_final(mailbox: Mailbox, reply: str) -> None:
    """The server knows that this mailbox will never do; the next address is not affected."""
    sender = mailer(mailbox.url)
    mailbox.rcpt_reply = reply
    with capture_logs() as lines, pytest.raises(SkipRetry, match=f"rejected alice@example.com permanently: {reply}"):
        sender.send(mail())
    assert not lines
    mailbox.rcpt_reply = "250 OK"
    sender.send(mail("bob@example.com"))
    assert len(mailbox.to("bob@example.com")) == 1
    assert mailbox.connections == 1, "a refused address does not cost the connection"
    close(sender)


@pytest.mark.parametrize(
    ("step", "reply"),
    [
        ("rcpt_reply", "550 5.7.1 relaying denied"),
        ("rcpt_reply", "530 5.7.0 log in first"),
        ("rcpt_reply", "503 MAIL first"),
        ("rcpt_reply", "550 relay not permitted"),
        ("rcpt_reply", "550 Invalid recipient"),
        ("rcpt_reply", "551 5.7.1 not local"),
        ("rcpt_reply", "553 sorry, that domain isn't in my list of allowed rcpthosts"),
        ("rcpt_reply", "504 5.5.2 <myhost>: Helo command rejected: need fully-qualified hostname"),
        ("rcpt_reply", "550 5.1.0 <no-reply@example.com>: Sender address rejected: User unknown"),
        ("rcpt_reply", "550 5.1.11 what is 5.1.1 at its beginning only"),
        ("rcpt_reply", "550 5.4.5 daily quota exceeded"),
        ("rcpt_reply", "552 too many recipients"),
        ("rcpt_reply", "552 5.2.2 full"),
        ("rcpt_reply", "554 5.4.6 loops back to myself"),
        ("data_reply", "554 5.6.0 message looks like spam"),
        ("data_reply", "550 5.1.1 too late to say so"),
    ],
)
def test_a_5xx_that_may_be_our_fault_is_shouted_about_and_tried_again(mailbox: Mailbox, step: str, reply: str) -> None:
    """It is our configuration, and nobody's row should die of it."""
    sender = mailer(mailbox.url)
    setattr(mailbox, step, reply)
    with capture_logs() as lines, pytest.raises(MailError, match=re.escape(reply)) as caught:
        sender.send(mail())
    assert not isinstance(caught.value, MailServerError)
    assert [(line["log_level"], line["event"], line["reply"]) for line in lines] == [
        ("error", "mail server rejected our request", reply)
    ]
    setattr(mailbox, step, "250 OK")
    sender.send(mail())
    assert len(mailbox.mails) == 1
    close(sender)


def test_a_failed_login_is_shouted_about_and_tried_again() -> None:
    """Without the password in the error or the log."""
    with serve_mailbox(auth_require_tls=False, **LOGIN) as mailbox:
        sender = mailer(f"smtp://user%40x:wrong-password@127.0.0.1:{mailbox.port}")
        with capture_logs() as lines, pytest.raises(MailError, match="rejected the login: 535") as caught:
            sender.send(mail())
    assert [line["log_level"] for line in lines] == ["error", "warning"]
    assert "wrong-password" not in f"{caught.value}{lines}"


def test_a_password_that_no_login_can_carry_is_not_quoted() -> None:
    """The error says where to look, and shows nothing of it."""
    with (
        serve_mailbox(auth_require_tls=False, **LOGIN) as mailbox,
        pytest.raises(MailError, match="SMTP_URL") as caught,
    ):
        mailer(f"smtp://user:p%C3%A4ss@127.0.0.1:{mailbox.port}").send(mail())
    assert "ä" not in str(caught.value)
    assert "xe4" not in str(caught.value)


def test_a_quoted_link_is_masked() -> None:
    """Mail servers quote the link that they dislike; the code in it must reach neither the log nor the row."""
    quoted = b"554 bad link http://x/v1/verify_email?email_id=1&secret_code=3D0123abcdef of yours, secret_code%3D456789"
    with serve_script(replies={"DATA": quoted}) as server:
        sender = mailer(server.url)
        with capture_logs() as lines, pytest.raises(MailError) as caught:
            sender.send(mail())
        for text in (str(caught.value), str(lines)):
            assert "bad link" in text
            assert "abcdef" not in text
            assert "456789" not in text
        close(sender)


def test_data_refused_before_the_mail() -> None:
    """A DATA command that is answered with 4xx or 5xx is a refusal like any other."""
    with serve_script(replies={"DATA": b"554 5.7.0 no mails today"}) as server:
        sender = mailer(server.url)
        with capture_logs() as lines, pytest.raises(MailError, match=r"rejected the mail: 554 5\.7\.0 no mails"):
            sender.send(mail())
        assert [line["log_level"] for line in lines] == ["error"]
        close(sender)


@pytest.mark.parametrize("step", ["CONNECT", "EHLO", "MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("does", ["hangs", "hangs up", "talks nonsense"])
def test_a_server_that_misbehaves_at_a_step(step: str, does: str) -> None:
    """A time limit ends every wait, and whatever happened, it is tried again on a new connection, never made dead."""
    replies = {"hangs": None, "hangs up": b"", "talks nonsense": b"\xff\xfe\0 what?"}
    steps = (step, "HELO") if step == "EHLO" else (step,)
    with serve_script(replies=dict.fromkeys(steps, replies[does])) as server:
        sender = mailer(server.url)
        started = time.monotonic()
        with pytest.raises((OSError, MailError)) as caught:  # smtplib's errors are OSErrors
            sender.send(mail())
        assert time.monotonic() - started < 3
        assert not isinstance(caught.value, SkipRetry)
        server.replies.clear()
        send_when_back(sender)
        eventually(lambda: server.mails == 1)
        close(sender)


def test_a_server_that_hangs_after_a_refusal_changes_nothing() -> None:
    """What was refused stays refused when RSET gets no answer."""
    with serve_script(replies={"RCPT": b"550 5.1.1 no", "RSET": None}) as server, pytest.raises(SkipRetry):
        mailer(server.url).send(mail())


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r\n."])
def test_a_mail_needs_no_line_end(mailbox: Mailbox, end: bytes) -> None:
    """However it ends, the server sees its end."""
    sender = mailer(mailbox.url)
    sender.send(Message("alice@example.com", b"Subject: Hello\r\n\r\nHello" + end))
    sender.send(mail())
    assert [mail.get_content().split()[0] for _, mail in mailbox.mails] == ["Hello", "Hello"]
    close(sender)


def test_a_mail_that_was_not_asked_for_is_not_sent() -> None:
    """An answer to DATA that is neither yes nor no belongs to something else: the mail is tried again."""
    with serve_script(replies={"DATA": b"250 fine"}) as server:
        sender = mailer(server.url)
        with pytest.raises(MailError, match="rejected the mail: 250 fine"):
            sender.send(mail())
        server.replies.clear()
        sender.send(mail())
        eventually(lambda: (server.mails, server.connections) == (1, 2))
        close(sender)


@pytest.mark.parametrize("data", [b"503 no recipient", b"354 go on", b"", None])
def test_what_is_answered_after_a_refusal_changes_nothing(data: bytes | None) -> None:
    """A server may be ready for the mail that it has refused the recipient of; the next mail goes through."""
    with serve_script(replies={"RCPT": b"550 5.1.1 no", "DATA": data}) as server:
        sender = mailer(server.url)
        with pytest.raises(SkipRetry, match=r"550 5\.1\.1 no"):
            sender.send(mail())
        server.replies.clear()
        sender.send(mail())
        eventually(lambda: server.mails == 1)
        close(sender)


def test_an_endless_reply_is_cut() -> None:
    """An error holds a readable part of what the server said."""
    reply = b"\r\n".join([b"450-" + b"x" * 500] * 100 + [b"450 end"])
    with serve_script(replies={"RCPT": reply}) as server:
        sender = mailer(server.url)
        with pytest.raises(MailError) as caught:
            sender.send(mail())
        assert len(str(caught.value)) < 400
        close(sender)


def test_an_international_address() -> None:
    """It is sent with SMTPUTF8 where the server can; where it cannot, that is told as ours and tried again."""
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
    """The envelope carries its ASCII form, the sender's as well, to a server that knows no SMTPUTF8."""
    with serve_mailbox(enable_SMTPUTF8=False) as mailbox:
        sender = mailer(mailbox.url, mail_from="no-reply@exämple.com")
        sender.send(mail("user@exämple.com"))
        assert [address for address, _ in mailbox.mails] == ["user@xn--exmple-cua.com"]
        close(sender)


@pytest.mark.parametrize("address", ["not an address", "a@example.com, b@example.com", "<>", "a@b@c"])
def test_what_is_no_address_is_final(address: str, mailbox: Mailbox) -> None:
    """It will never be one, and the server is not asked."""
    with pytest.raises(SkipRetry, match="not valid"):
        mailer(mailbox.url).send(mail(address))
    assert mailbox.connections == 0


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Aiosmtpd warns of logins without TLS, which is what some of these tests are about."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Requiring AUTH while not requiring TLS")
        yield


def test_a_mail_that_the_server_is_taking_is_not_given_up(mailbox: Mailbox) -> None:
    """The attempt's time is over before the answer to the mail comes: it is waited for a few seconds more."""
    mailbox.data_delay = 1
    sender = mailer(mailbox.url, smtp_timeout=10)
    within(0.8, lambda: sender.send(mail()))
    assert len(mailbox.mails) == 1
    close(sender)


def test_a_server_that_answers_in_drips_takes_no_longer_than_a_step() -> None:
    """Each of its lines comes in time, and the answer never ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    for _ in range(100):
                        connection.sendall(b"220-still here\r\n")
                        time.sleep(0.1)

        Thread(target=drip, daemon=True).start()
        sender = mailer(f"smtp://127.0.0.1:{listener.getsockname()[1]}", smtp_timeout=0.5)
        began = time.monotonic()
        with pytest.raises(MailError, match="timed out"):
            sender.send(mail())
        assert time.monotonic() - began < 2


@contextmanager
def slow_tls(mailbox: Mailbox, answer: float, handshake: float) -> Iterator[str]:
    """Passes everything on to a mailbox, but for its answer to STARTTLS and its handshake: these come seconds later."""

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        has_greeted = False
        with suppress(OSError):
            while data := source.recv(65536):
                if data.startswith(b"220") and has_greeted:
                    time.sleep(answer)
                if data.startswith(b"\x16\x03") and source.getpeername()[1] == mailbox.port:
                    time.sleep(handshake)
                has_greeted = True
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        client, _ = listener.accept()
        with client, socket.create_connection(("127.0.0.1", mailbox.port)) as server:
            asking = Thread(target=pass_on, args=(client, server), daemon=True)
            asking.start()
            pass_on(server, client)
            asking.join(10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = Thread(target=serve, daemon=True)
        serving.start()
        yield f"smtp+starttls://127.0.0.1:{listener.getsockname()[1]}"
        serving.join(10)


def test_a_slow_handshake_leaves_less_time_for_the_next_step(authority: trustme.CA) -> None:
    """The steps after STARTTLS are limited on the connection in TLS, and not on the one before."""
    with serve_mailbox(tls_context=tls(authority)) as mailbox, slow_tls(mailbox, 0, 1) as url:
        sender = mailer(url, smtp_timeout=10)
        within(5, lambda: sender.send(mail()))
        assert len(mailbox.mails) == 1
        close(sender)


def test_a_handshake_takes_no_longer_than_the_attempt(authority: trustme.CA) -> None:
    """What is left for it counts from the answer to STARTTLS, and not from the question."""
    with serve_mailbox(tls_context=tls(authority)) as mailbox, slow_tls(mailbox, 1.6, 5) as url:
        sender = mailer(url, smtp_timeout=10)
        began = time.monotonic()
        with pytest.raises(TimeLimitError):
            within(2, lambda: sender.send(mail()))
        assert time.monotonic() - began < 3.3
        assert not mailbox.mails


def test_an_address_that_the_system_does_not_know_is_passed_over(
    mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host without IPv6, say: the next address is tried."""
    unknown = (999, socket.SOCK_STREAM, 6, "", ("::1", mailbox.port))
    known = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", mailbox.port))
    monkeypatch.setattr("outbox_worker.addresses.socket.getaddrinfo", lambda *_, **__: [unknown, known])
    sender = mailer(mailbox.url)
    sender.send(mail())
    assert len(mailbox.mails) == 1
    close(sender)
