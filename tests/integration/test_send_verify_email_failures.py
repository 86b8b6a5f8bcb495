"""The handler of verification mails if the mail server fails: whether the attempt counts, and the row's error."""

import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import trustme
from structlog.testing import capture_logs

from outbox.runtime import endpoints
from outbox.runtime.settings import WorkerSettings
from outbox_worker.attempt import NOT_NOW_DELAY
from outbox_worker.mail import Mailer
from outbox_worker.outcome import Outcome
from tests.conftest import Connection
from tests.support.attempts import KnownContext
from tests.support.mailbox import Mailbox, free_port, serve_mailbox, serve_script, tls
from tests.support.verification_mails import add_user, attempt_row, context_of
from tests.support.waiting import eventually


@pytest.fixture
def context(worker_settings: WorkerSettings) -> Iterator[KnownContext]:
    """A context for the handler."""
    with context_of(worker_settings) as opened:
        yield opened


HANG = None


@pytest.mark.parametrize(
    ("replies", "status", "error"),
    [
        pytest.param({"RCPT": HANG}, "pending", "timed out", id="hangs at RCPT"),
        pytest.param({"DATA": HANG}, "pending", "timed out", id="hangs at DATA"),
        pytest.param({".": HANG}, "pending", "timed out", id="hangs after the dot"),
        pytest.param({"QUIT": HANG}, "done", None, id="hangs at QUIT"),
        pytest.param({"RCPT": b"450 4.2.1 busy"}, "pending", "recipient: 450 4.2.1 busy", id="4xx at RCPT"),
        pytest.param({"DATA": b"452 4.3.1 full"}, "pending", "mail: 452 4.3.1 full", id="4xx at DATA"),
        pytest.param({".": b"451 4.7.1 wait"}, "pending", "mail: 451 4.7.1 wait", id="4xx after the dot"),
        pytest.param({"RCPT": b"550 5.1.1 unknown"}, "dead", "550 5.1.1 unknown", id="5xx for the address"),
    ],
)
def test_a_mail_server_that_fails(
    connection: Connection, context: KnownContext, replies: dict[str, bytes | None], status: str, error: str | None
) -> None:
    """The row is dead if the mailbox is rejected permanently, done if the mail is accepted, else tried again."""
    with serve_script(replies) as server, capture_logs() as lines:
        outcome = attempt_with(connection, context, server.url)
        eventually(lambda: server.mails == (status == "done"), 5)
    assert (outcome.status, outcome.attempts, outcome.delay > 0) == (status, 1, status == "pending")
    assert (error or "") in (outcome.error or "")
    assert "mail server rejected our request" not in [line["event"] for line in lines], "no operator has to act"


@pytest.mark.parametrize(
    ("replies", "error"),
    [
        pytest.param({"CONNECT": HANG}, "timed out", id="hangs at the greeting"),
        pytest.param({"CONNECT": b"421 4.7.0 too many"}, "421 4.7.0 too many", id="421 at the greeting"),
        pytest.param({"CONNECT": b""}, "Connection unexpectedly closed", id="disconnects at the greeting"),
        pytest.param({"EHLO": HANG}, "timed out", id="hangs at EHLO"),
        pytest.param({"MAIL": HANG}, "timed out", id="hangs at MAIL"),
        pytest.param({"MAIL": b"451 4.3.0 later"}, "sender: 451 4.3.0 later", id="4xx at MAIL"),
        pytest.param({"RCPT": b"421 4.7.0 slow down"}, "421 4.7.0 slow down", id="421 at RCPT"),
        pytest.param({"DATA": b"421 4.7.0 slow down"}, "421 4.7.0 slow down", id="421 at DATA"),
    ],
)
def test_a_mail_server_that_is_away(
    connection: Connection, context: KnownContext, replies: dict[str, bytes | None], error: str
) -> None:
    """The attempt does not count, and the outage is logged once."""
    with serve_script(replies) as server, capture_logs() as lines:
        outcome = attempt_with(connection, context, server.url)
    assert_not_counted(outcome, error)
    assert [line["event"] for line in lines] == ["mail server is away"]


@pytest.mark.parametrize(
    ("replies", "refused"),
    [
        pytest.param({"MAIL": b"550 5.7.1 not you"}, "the sender", id="550 for the sender"),
        pytest.param({"MAIL": b"553 5.1.8 not you"}, "the sender", id="553 for the sender"),
        pytest.param({"EHLO": b"250-me\r\n250 AUTH PLAIN", "AUTH": b"535 5.7.8 not you"}, "the login", id="login"),
        pytest.param({"CONNECT": b"554 5.7.1 not you"}, "the connection", id="554 at the greeting"),
        pytest.param({"EHLO": b"550 5.7.1 no", "HELO": b"550 5.7.1 not you"}, "the connection", id="550 at EHLO"),
    ],
)
def test_a_mail_server_that_rejects_us(
    connection: Connection, context: KnownContext, replies: dict[str, bytes | None], refused: str
) -> None:
    """It is logged as an error, because an operator must fix the configuration. The attempt does not count."""
    with serve_script(replies) as server, capture_logs() as lines:
        url = server.url.replace("//", "//user:password@") if "AUTH" in replies else server.url
        outcome = attempt_with(connection, context, url)
    reply = (next(reversed(replies.values())) or b"").decode()
    shown = reply.removesuffix(" not you") if refused == "the login" else reply  # its text may quote the password
    assert_not_counted(outcome, f"rejected {refused}: {shown}")
    errors = [line for line in lines if line["event"] == "mail server rejected our request"]
    assert [(line["log_level"], line["refused"]) for line in errors] == [("error", refused)]


def test_a_mail_server_that_resets_the_connection(connection: Connection, context: KnownContext) -> None:
    """A mail whose connection is reset is tried again, and the attempt counts."""
    with serve_script(resets=True) as server:
        assert_tried_again(attempt_with(connection, context, server.url), "Connection reset by peer")


def test_a_mail_server_that_is_down(connection: Connection, context: KnownContext) -> None:
    """If the connection is refused, the mail is tried again, and the attempt does not count."""
    assert_not_counted(attempt_with(connection, context, f"smtp://127.0.0.1:{free_port()}"), "Connection refused")


FLAWS = {
    "another name": "not valid for '127.0.0.1'",
    "self-signed": "self-signed certificate",
    "no STARTTLS": "STARTTLS extension not supported",
}


@pytest.mark.parametrize(
    ("scheme", "flaw"),
    [
        *(("smtps", flaw) for flaw in ("another name", "self-signed")),
        *(("smtp+starttls", flaw) for flaw in FLAWS),
    ],
)
def test_a_mail_server_that_cannot_prove_its_name(
    connection: Connection, context: KnownContext, authority: trustme.CA, scheme: str, flaw: str
) -> None:
    """It gets no mail. The row is tried again, and its error names the flaw."""
    served = {"another name": tls(authority, "mail.example.org"), "self-signed": self_signed(), "no STARTTLS": None}
    options: dict[str, Any] = {"ssl_context" if scheme == "smtps" else "tls_context": served[flaw]}
    with serve_mailbox(**options) as mailbox:
        outcome = attempt_with(connection, context, mailbox.url.replace("smtp", scheme), timeout=5)
        assert not mailbox.mails
    assert_not_counted(outcome, FLAWS[flaw])


def test_no_mail_is_begun_after_the_attempts_time(
    connection: Connection, context: KnownContext, mailbox: Mailbox
) -> None:
    """An attempt without time left is put off before it connects to the mail server."""
    late = replace(context, deadline=time.monotonic())
    outcome = attempt_row(connection, late, add_user(connection, "alice"))
    assert (outcome.status, outcome.attempts) == ("pending", 0)
    assert "the attempt's time is over" in str(outcome.error)
    assert not mailbox.mails


def test_a_step_with_the_mail_server_takes_no_longer_than_the_attempt(
    connection: Connection, context: KnownContext, mailbox: Mailbox
) -> None:
    """A mail server that does not reply is given up with the attempt's time, long before its own limit."""
    row = add_user(connection, "alice")
    with serve_script({"MAIL": None}) as server:
        mailer = Mailer(context.settings.model_copy(update={"smtp_server": endpoints.smtp_server(server.url)}))
        started = time.monotonic()
        outcome = attempt_row(connection, replace(context, deadline=started + 0.5, send=mailer.send), row)
    assert outcome.status == "pending"
    assert 0.4 < time.monotonic() - started < 3
    assert not mailbox.mails


def assert_not_counted(outcome: Outcome, error: str) -> None:
    """Checks that the row is given back without counting the attempt, and that its error has the text."""
    assert (outcome.status, outcome.attempts, outcome.delay) == ("pending", 0, NOT_NOW_DELAY)
    assert error in str(outcome.error)


def assert_tried_again(outcome: Outcome, error: str) -> None:
    """Checks that the row is tried again and the attempt counts, and that its error has the text."""
    assert (outcome.status, outcome.attempts, outcome.delay > 0) == ("pending", 1, True)
    assert error in str(outcome.error)


def attempt_with(connection: Connection, context: KnownContext, url: str, timeout: float = 0.3) -> Outcome:
    """Makes an attempt at a new user's row with another mail server; `timeout` is the seconds for each step."""
    server = {"smtp_server": endpoints.smtp_server(url), "smtp_timeout": timeout}
    mailer = Mailer(context.settings.model_copy(update=server))
    outcome = attempt_row(connection, replace(context, send=mailer.send), add_user(connection, "alice"))
    mailer.close_idle(0)
    return outcome


def self_signed() -> ssl.SSLContext:
    """Returns a server's context with a self-signed certificate."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with authority.cert_pem.tempfile() as certificate, authority.private_key_pem.tempfile() as key:
        context.load_cert_chain(certificate, key)
    return context
