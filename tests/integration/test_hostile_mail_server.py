"""A mail server, or a proxy before it, that violates SMTP: it hangs, disconnects or sends malformed replies."""

import base64
import time

import pytest

from outbox import SkipRetry
from outbox_worker.mail_errors import MailError, MailServerError
from tests.support.mailbox import serve_script
from tests.support.mailing import close, mail, mailer, send_when_back
from tests.support.waiting import eventually


@pytest.mark.usefixtures("pipelining")
@pytest.mark.parametrize("step", ["CONNECT", "EHLO", "MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("does", ["hangs", "disconnects", "sends garbage"])
def test_a_server_that_misbehaves_at_a_step(step: str, does: str) -> None:
    """A time limit ends every wait, and the mail is tried again on a new connection. The row is never dead."""
    replies = {"hangs": None, "disconnects": b"", "sends garbage": b"\xff\xfe\0 what?"}
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


@pytest.mark.parametrize("step", ["CONNECT", "EHLO", "MAIL", "RCPT", "DATA", "."])
def test_an_answer_without_end_is_not_read_to_its_end(step: str) -> None:
    """A client keeps all lines of a reply until the last one: without a limit, up to a gigabyte per step."""
    code = {"CONNECT": b"220", "DATA": b"354"}.get(step, b"250")
    with serve_script({step: (code + b"-" + b"x" * 500 + b"\r\n") * 400 + code + b" go on"}) as server:
        sender = mailer(server.url, smtp_timeout=5)
        with pytest.raises(MailError, match="its reply is over 64 KiB"):
            sender.send(mail())
        close(sender)


def test_a_long_reply_is_read() -> None:
    """A reply to EHLO with a thousand lines is accepted."""
    with serve_script({"EHLO": b"250-X-EXTENSION\r\n" * 1000 + b"250 HELP"}) as server:
        sender = mailer(server.url, smtp_timeout=5)
        for _ in range(3):
            sender.send(mail())
        close(sender)
        eventually(lambda: server.mails == 3, 5, "the server counts a mail after it has replied")


@pytest.mark.parametrize("kind", [b"CRAM-MD5", b"LOGIN", b"PLAIN"])
@pytest.mark.parametrize(
    "challenge", [b"abc", b"a", b"\xff", b"=", base64.b64encode(b"\xff")], ids=["abc", "a", "xff", "=", "base64 of xff"]
)
def test_a_malformed_challenge_is_the_servers_fault(kind: bytes, challenge: bytes) -> None:
    """No mail is at fault, so the attempt does not count."""
    with serve_script({"EHLO": b"250-this\r\n250 AUTH " + kind, "AUTH": b"334 " + challenge}) as server:
        sender = mailer(server.url.replace("//", "//user:password@"), smtp_timeout=5)
        with pytest.raises(MailServerError):
            sender.send(mail())
        close(sender)
