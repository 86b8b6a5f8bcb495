"""Replies of a mail server: which are an outage, which are final, and which are tried again."""

import re

import pytest
from structlog.testing import capture_logs

from outbox import SkipRetry
from outbox_worker.mail_errors import MailError, MailServerError
from tests.support.mailbox import LOGIN, Mailbox, serve_mailbox, serve_script
from tests.support.mailing import close, mail, mailer, send_when_back
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.usefixtures("pipelining"),
    pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS"),
]


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
    """The error has the server's text, and nothing is logged. The next mail is accepted."""
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
def test_a_reply_that_concerns_all_mails_is_an_outage(mailbox: Mailbox, step: str, reply: str) -> None:
    """It is logged when it begins and when it ends, and once more as an error if an operator must act."""
    sender = mailer(mailbox.url)
    setattr(mailbox, step, reply)
    with capture_logs() as lines:
        for _ in range(5):
            with pytest.raises(MailServerError, match=reply.split(":", maxsplit=1)[0]):
                sender.send(mail())
            assert sender.is_away
        setattr(mailbox, step, "250 OK")
        send_when_back(sender)
    errors = ["mail server rejected our request"] if reply.startswith("5") else []
    assert [line["event"] for line in lines] == [*errors, "mail server is away", "mail server is back"]
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
    """The mailbox accepts no mail now or later; other recipients are not affected."""
    sender = mailer(mailbox.url)
    mailbox.rcpt_reply = reply
    with capture_logs() as lines, pytest.raises(SkipRetry, match=f"rejected alice@example.com permanently: {reply}"):
        sender.send(mail())
    assert not lines
    mailbox.rcpt_reply = "250 OK"
    sender.send(mail("bob@example.com"))
    assert len(mailbox.to("bob@example.com")) == 1
    assert mailbox.connections == 1, "a rejected address does not cost the connection"
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
        ("rcpt_reply", "550 5.1.11 begins with 5.1.1"),
        ("rcpt_reply", "550 5.4.5 daily quota exceeded"),
        ("rcpt_reply", "552 too many recipients"),
        ("rcpt_reply", "552 5.2.2 full"),
        ("rcpt_reply", "554 5.4.6 loops back to myself"),
        ("data_reply", "554 5.6.0 message looks like spam"),
        ("data_reply", "550 5.1.1 too late to say so"),
    ],
)
def test_a_5xx_that_may_be_our_fault_is_an_error_and_tried_again(mailbox: Mailbox, step: str, reply: str) -> None:
    """Our configuration may be wrong, which must make no row dead."""
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


def test_a_failed_login_is_an_error_and_tried_again() -> None:
    """Neither the error nor the log has the password."""
    with serve_mailbox(auth_require_tls=False, **LOGIN) as mailbox:
        sender = mailer(f"smtp://user%40x:wrong-password@127.0.0.1:{mailbox.port}")
        with capture_logs() as lines, pytest.raises(MailError, match="rejected the login: 535") as caught:
            sender.send(mail())
    assert [line["log_level"] for line in lines] == ["error", "warning"]
    assert "wrong-password" not in f"{caught.value}{lines}"


def test_a_password_with_non_ascii_characters_is_not_quoted() -> None:
    """The error names the setting, and shows no part of the password."""
    with (
        serve_mailbox(auth_require_tls=False, **LOGIN) as mailbox,
        pytest.raises(MailError, match="SMTP_URL") as caught,
    ):
        mailer(f"smtp://user:p%C3%A4ss@127.0.0.1:{mailbox.port}").send(mail())
    assert "ä" not in str(caught.value)
    assert "xe4" not in str(caught.value)


def test_a_quoted_link_is_masked() -> None:
    """Mail servers quote links that they reject. The code in them reaches neither the log nor the row."""
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


def test_a_rejected_data_command_rejects_the_mail() -> None:
    """A 5xx reply to DATA is logged and raised like one to the whole mail."""
    with serve_script(replies={"DATA": b"554 5.7.0 no mails today"}) as server:
        sender = mailer(server.url)
        with capture_logs() as lines, pytest.raises(MailError, match=r"rejected the mail: 554 5\.7\.0 no mails"):
            sender.send(mail())
        assert [line["log_level"] for line in lines] == ["error"]
        close(sender)


def test_no_mail_is_sent_without_a_354() -> None:
    """A 2xx reply to DATA belongs to another command: the mail is tried again on a new connection."""
    with serve_script(replies={"DATA": b"250 fine"}) as server:
        sender = mailer(server.url)
        with pytest.raises(MailError, match="rejected the mail: 250 fine"):
            sender.send(mail())
        server.replies.clear()
        sender.send(mail())
        eventually(lambda: (server.mails, server.connections) == (1, 2))
        close(sender)


@pytest.mark.parametrize("data", [b"503 no recipient", b"354 go on", b"", None])
def test_the_reply_to_data_after_a_rejected_recipient_changes_nothing(data: bytes | None) -> None:
    """The server may expect a mail although it rejected the recipient. The next mail is accepted."""
    with serve_script(replies={"RCPT": b"550 5.1.1 no", "DATA": data}) as server:
        sender = mailer(server.url)
        with pytest.raises(SkipRetry, match=r"550 5\.1\.1 no"):
            sender.send(mail())
        server.replies.clear()
        sender.send(mail())
        eventually(lambda: server.mails == 1)
        close(sender)


def test_a_server_that_hangs_at_rset_changes_nothing() -> None:
    """A rejected mail stays rejected if RSET gets no reply."""
    with serve_script(replies={"RCPT": b"550 5.1.1 no", "RSET": None}) as server, pytest.raises(SkipRetry):
        mailer(server.url).send(mail())


def test_a_long_reply_is_cut() -> None:
    """An error has a readable part of the reply."""
    reply = b"\r\n".join([b"450-" + b"x" * 500] * 100 + [b"450 end"])
    with serve_script(replies={"RCPT": reply}) as server:
        sender = mailer(server.url)
        with pytest.raises(MailError) as caught:
            sender.send(mail())
        assert len(str(caught.value)) < 400
        close(sender)
