"""The verification mail's handler: the same link at every attempt, and nobody who should get none."""

import json
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import trustme
from structlog.testing import capture_logs

from outbox import SkipRetry
from outbox.runtime import endpoints, postgres
from outbox.runtime.settings import WorkerSettings
from outbox.signup.secret_code import is_secret_code
from outbox_worker.attempt import NOT_NOW_DELAY, attempt
from outbox_worker.claim import claim
from outbox_worker.database import HandlerPool
from outbox_worker.handlers import registry
from outbox_worker.handlers.send_verify_email import Recipient, _VerificationMail
from outbox_worker.mail import Mailer
from outbox_worker.outcome import Outcome
from tests.conftest import Connection
from tests.support.attempts import KnownContext
from tests.support.mailbox import Mailbox, free_port, link_in, serve_mailbox, serve_script, tls
from tests.support.processes import add_users
from tests.support.rows import add_row
from tests.support.waiting import eventually


@pytest.fixture
def context(worker_settings: WorkerSettings) -> Iterator[KnownContext]:
    """What the handler is given, with links under a path."""
    settings = worker_settings.model_copy(update={"public_url": "https://example.com/app"})
    mailer = Mailer(settings)
    with HandlerPool(settings.database_url) as pool:
        deadline = time.monotonic() + 60
        yield KnownContext(row_id=0, attempt=1, deadline=deadline, database=pool, send=mailer.send, settings=settings)
    mailer.close_idle(0)


def run(connection: Connection, context: KnownContext, row: int) -> Outcome:
    """Makes one attempt at a user's row, as if it had been handed over just now."""
    from outbox.rq_jobs import Delivery

    connection.execute("UPDATE outbox SET status = 'enqueued', delivery = 1, lease_until = NULL, run_at = now()")
    (claimed,) = claim(connection, [Delivery(row, 1)], "me", 60)
    own = replace(context, row_id=row, attempt=claimed.attempt)
    return attempt(claimed, registry(context.settings), own, 3600).outcome


def row_of(connection: Connection, name: str) -> int:
    """Creates a user and returns the row's id."""
    add_users(connection, [name])
    found = connection.execute("SELECT id FROM outbox").fetchone()
    assert found is not None
    return int(found["id"])


def test_every_attempt_sends_the_same_mail(connection: Connection, context: KnownContext, mailbox: Mailbox) -> None:
    """One verification row, one link, one Message-ID; the link is open for its full time from the latest attempt."""
    row = row_of(connection, "alice")
    mailbox.data_reply = "451 4.3.0 after all not"
    assert run(connection, context, row).status == "pending"
    connection.execute("UPDATE verify_emails SET expired_at = now() - interval '1 hour'")
    mailbox.data_reply = "250 OK"
    assert run(connection, context, row).status == "done"
    assert run(connection, context, row).status == "done"

    first, second = mailbox.to("alice@example.com")
    assert first["Message-ID"] == second["Message-ID"]
    assert link_in(first) == link_in(second)
    verification = connection.execute(
        "SELECT *, extract(epoch FROM expired_at - now()) AS lifetime FROM verify_emails"
    ).fetchall()
    assert len(verification) == 1
    assert 890 < verification[0]["lifetime"] <= 900

    link = urlsplit(link_in(first))
    assert (link.scheme, link.netloc, link.path) == ("https", "example.com", "/app/v1/verify_email")
    parameters = parse_qs(link.query)
    assert parameters["email_id"] == [str(verification[0]["id"])]
    code = parameters["secret_code"][0]
    assert is_secret_code(code, context.settings.secret_key, verification[0]["id"], "alice", "alice@example.com")


def test_a_user_who_is_gone_gets_none(connection: Connection, context: KnownContext, mailbox: Mailbox) -> None:
    """The row is dead with a sentence that names the user."""
    row = add_row(connection, task="send_verify_email", payload='{"username": "gone"}').row_id
    outcome = run(connection, context, row)
    assert (outcome.status, outcome.error) == ("dead", "the user gone does not exist")
    assert not mailbox.mails


def test_a_user_who_has_verified_meanwhile_gets_no_second_mail(
    connection: Connection, context: KnownContext, mailbox: Mailbox
) -> None:
    """An attempt that died after its mail went out is repeated; the user may have been quicker."""
    row = row_of(connection, "alice")
    assert run(connection, context, row).status == "done"
    connection.execute("UPDATE users SET is_email_verified = true")
    assert run(connection, context, row).status == "done"
    assert len(mailbox.mails) == 1


def test_a_connection_that_breaks_before_the_mail_costs_no_attempt(
    connection: Connection, context: KnownContext, mailbox: Mailbox, database_url: str
) -> None:
    """Nothing is sent by then, so the same attempt begins anew on another connection."""
    row = row_of(connection, "alice")
    cut = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted AND relation = 'verify_emails'::regclass"
    locked = threading.Event()

    def cut_it_off() -> None:
        with postgres.connect(database_url, "holder") as holder, holder.transaction():
            holder.execute("LOCK TABLE verify_emails")
            locked.set()
            eventually(lambda: holder.execute(cut).fetchall(), 10, "the handler's connection is cut")

    with ThreadPoolExecutor(1) as other:
        is_cut = other.submit(cut_it_off)
        assert locked.wait(10)
        assert run(connection, context, row).status == "done"
        is_cut.result()
    assert len(mailbox.mails) == 1


def test_many_at_once_each_get_their_own(connection: Connection, context: KnownContext) -> None:
    """Verifications are opened together: with one user gone and one verified among them, none is mixed up."""
    names = [f"user_{n}" for n in range(30)]
    add_users(connection, names)
    connection.execute("DELETE FROM users WHERE username = 'user_7'")
    connection.execute("UPDATE users SET is_email_verified = true WHERE username = 'user_8'")
    rows = connection.execute("SELECT id, payload ->> 'username' AS name FROM outbox").fetchall()
    handle = registry(context.settings)["send_verify_email"]
    sent: list[Any] = []

    def attempt_at(row: dict[str, Any]) -> bool:
        try:
            handle.function(
                handle.task.parse(json.dumps({"username": row["name"]})),
                replace(context, row_id=row["id"], send=sent.append),
            )
        except SkipRetry:
            assert row["name"] == "user_7"
            return False
        return True

    with ThreadPoolExecutor(30) as threads:
        assert sum(threads.map(attempt_at, rows)) == 29

    opened = {row["id"]: row for row in connection.execute("SELECT * FROM verify_emails").fetchall()}
    assert {row["username"]: row["outbox_id"] for row in opened.values()} == {
        row["name"]: row["id"] for row in rows if row["name"] not in ("user_7", "user_8")
    }
    assert len(sent) == 28
    for message in sent:
        name = message.recipient.removesuffix("@example.com")
        mail = message_from_bytes(message.content, policy=policy.default)
        assert isinstance(mail, EmailMessage)
        assert (mail["To"], f"{name}@example.com") == (message.recipient, message.recipient)
        parameters = parse_qs(urlsplit(link_in(mail)).query)
        email_id, code = int(parameters["email_id"][0]), parameters["secret_code"][0]
        assert opened[email_id]["username"] == name
        assert is_secret_code(code, context.settings.secret_key, email_id, name, message.recipient)


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
    """The row is dead where the address is refused for good, done once the mail is taken, and else tried again."""
    with serve_script(replies) as server, capture_logs() as lines:
        outcome = tried(connection, context, server.url)
        eventually(lambda: server.mails == (status == "done"), 5)
    assert (outcome.status, outcome.attempts, outcome.delay > 0) == (status, 1, status == "pending")
    assert (error or "") in (outcome.error or "")
    assert "mail server rejected our request" not in [line["event"] for line in lines], "it is nobody's mistake"


@pytest.mark.parametrize(
    ("replies", "error"),
    [
        pytest.param({"CONNECT": HANG}, "timed out", id="hangs at the greeting"),
        pytest.param({"CONNECT": b"421 4.7.0 too many"}, "421 4.7.0 too many", id="421 at the greeting"),
        pytest.param({"CONNECT": b""}, "Connection unexpectedly closed", id="hangs up at the greeting"),
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
    """The attempt does not count, and one line says that it is away."""
    with serve_script(replies) as server, capture_logs() as lines:
        outcome = tried(connection, context, server.url)
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
def test_a_mail_server_that_refuses_us(
    connection: Connection, context: KnownContext, replies: dict[str, bytes | None], refused: str
) -> None:
    """It is shouted about, as somebody must mend the configuration, and the row is tried again until then."""
    with serve_script(replies) as server, capture_logs() as lines:
        url = server.url.replace("//", "//user:password@") if "AUTH" in replies else server.url
        outcome = tried(connection, context, url)
    reply = (next(reversed(replies.values())) or b"").decode()
    told = reply.removesuffix(" not you") if refused == "the login" else reply  # which may be quoted there
    assert_not_counted(outcome, f"rejected {refused}: {told}")
    shouts = [line for line in lines if line["event"] == "mail server rejected our request"]
    assert [(line["log_level"], line["refused"]) for line in shouts] == [("error", refused)]


def test_a_mail_server_that_breaks_off(connection: Connection, context: KnownContext) -> None:
    """A connection that is reset in the middle of a mail is tried again."""
    with serve_script(resets=True) as server:
        assert_tried_again(tried(connection, context, server.url), "Connection reset by peer")


def test_a_mail_server_that_is_down(connection: Connection, context: KnownContext) -> None:
    """A connection that is refused is tried again, and the attempt does not count."""
    assert_not_counted(tried(connection, context, f"smtp://127.0.0.1:{free_port()}"), "Connection refused")


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
def test_a_mail_server_that_may_be_another(
    connection: Connection, context: KnownContext, authority: trustme.CA, scheme: str, flaw: str
) -> None:
    """A server that cannot show who it is gets no mail; the row is tried again, and the error names the flaw."""
    served = {"another name": tls(authority, "mail.example.org"), "self-signed": self_signed(), "no STARTTLS": None}
    options: dict[str, Any] = {"ssl_context" if scheme == "smtps" else "tls_context": served[flaw]}
    with serve_mailbox(**options) as mailbox:
        outcome = tried(connection, context, mailbox.url.replace("smtp", scheme), timeout=5)
        assert not mailbox.mails
    assert_not_counted(outcome, FLAWS[flaw])


def assert_not_counted(outcome: Outcome, error: str) -> None:
    """Checks that the row goes back at once and with its attempt, and that its error names what happened."""
    assert (outcome.status, outcome.attempts, outcome.delay) == ("pending", 0, NOT_NOW_DELAY)
    assert error in str(outcome.error)


def assert_tried_again(outcome: Outcome, error: str) -> None:
    """Checks that the row goes back with a delay, and that its error names what happened."""
    assert (outcome.status, outcome.attempts, outcome.delay > 0) == ("pending", 1, True)
    assert error in str(outcome.error)


def tried(connection: Connection, context: KnownContext, url: str, timeout: float = 0.3) -> Outcome:
    """Makes one attempt at a new user's row with another mail server, which has so many seconds for each step."""
    server = {"smtp_server": endpoints.smtp_server(url), "smtp_timeout": timeout}
    mailer = Mailer(context.settings.model_copy(update=server))
    outcome = run(connection, replace(context, send=mailer.send), row_of(connection, "alice"))
    mailer.close_idle(0)
    return outcome


def self_signed() -> ssl.SSLContext:
    """Returns a server's context with a certificate that nobody but itself vouches for."""
    made = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with made.cert_pem.tempfile() as certificate, made.private_key_pem.tempfile() as key:
        context.load_cert_chain(certificate, key)
    return context


def test_no_transaction_is_open_while_it_talks_to_the_mail_server(
    connection: Connection, context: KnownContext, mailbox: Mailbox
) -> None:
    """A slow mail server must not hold a snapshot or a lock in Postgres."""
    row = row_of(connection, "alice")
    seen: list[object] = []

    def send(message: object) -> None:
        seen.extend(
            connection.execute(
                "SELECT state FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid() AND state <> 'idle'"
            ).fetchall()
        )
        seen.extend(connection.execute("SELECT FROM verify_emails FOR UPDATE NOWAIT").fetchall())

    assert run(connection, replace(context, send=send), row).status == "done"
    assert seen == [{}], "nothing but the verification row that was locked just now"


@pytest.mark.parametrize("emails", [["alice@example.com", "bob@example.com"], ["alice@example.com", "BOB@example.com"]])
def test_ids_that_come_again_misdirect_no_mail(
    connection: Connection, context: KnownContext, mailbox: Mailbox, emails: list[str]
) -> None:
    """After a restore a new user's row has an old row's id: the mail is the new user's own, and so is its link."""
    row = row_of(connection, "alice")
    assert run(connection, context, row).status == "done"
    connection.execute("TRUNCATE outbox RESTART IDENTITY")
    connection.execute("DELETE FROM users WHERE username = 'bob'")
    add_users(connection, ["bob"])
    connection.execute("UPDATE users SET email = %s, full_name = 'Bob B' WHERE username = 'bob'", [emails[1]])
    assert connection.execute("SELECT id FROM outbox").fetchall() == [{"id": row}], "the id has come again"

    with capture_logs() as lines:
        assert run(connection, context, row).status == "done"
        assert run(connection, context, row).status == "done", "and so at every attempt"

    (first,) = mailbox.to(emails[0])
    second, again = mailbox.to(emails[1])
    assert first["Message-ID"] != second["Message-ID"] == again["Message-ID"]
    assert link_in(first) != link_in(second) == link_in(again)
    assert "Bob B" in second.as_string()
    assert [line["rows"] for line in lines if line["event"] == "detached verification"] == [[row]]
    verifications = connection.execute("SELECT username, email, outbox_id FROM verify_emails ORDER BY id").fetchall()
    assert verifications == [
        {"username": "alice", "email": emails[0], "outbox_id": None},
        {"username": "bob", "email": emails[1], "outbox_id": row},
    ]


def test_a_corrected_address_gets_the_mail(connection: Connection, context: KnownContext, mailbox: Mailbox) -> None:
    """The address that the user has now, with a link that is for it."""
    row = row_of(connection, "alice")
    assert run(connection, context, row).status == "done"
    connection.execute("UPDATE users SET email = 'corrected@example.com'")
    assert run(connection, context, row).status == "done"
    (old,), (new,) = mailbox.to("alice@example.com"), mailbox.to("corrected@example.com")
    assert link_in(old) != link_in(new)
    assert old["Message-ID"] != new["Message-ID"]
    parameters = parse_qs(urlsplit(link_in(new)).query)
    code, email_id = parameters["secret_code"][0], int(parameters["email_id"][0])
    assert is_secret_code(code, context.settings.secret_key, email_id, "alice", "corrected@example.com")


def test_a_used_link_is_not_sent_again(connection: Connection, context: KnownContext, mailbox: Mailbox) -> None:
    """A user who has to verify the same address once more gets a link that can be used."""
    row = row_of(connection, "alice")
    assert run(connection, context, row).status == "done"
    connection.execute("UPDATE verify_emails SET is_used = true")
    assert run(connection, context, row).status == "done"
    first, second = mailbox.to("alice@example.com")
    assert link_in(first) != link_in(second)


def test_ids_that_come_again_among_others_are_told_apart(connection: Connection, context: KnownContext) -> None:
    """Of verifications that are opened together, each is its own user's, whatever was under the ids before."""
    add_users(connection, [f"old_{n}" for n in range(9)])
    rows = [row["id"] for row in connection.execute("SELECT id FROM outbox ORDER BY id")]
    for row in rows[::2]:
        assert run_alone(connection, context, row).status == "done"
    connection.execute("UPDATE outbox SET payload = jsonb_build_object('username', 'new_' || id)")
    add_users(connection, [f"new_{row}" for row in rows])
    opened = _VerificationMail(context.settings)._open_all(context, [Recipient(row, f"new_{row}") for row in rows])
    assert [found and found.email for found in opened] == [f"new_{row}@example.com" for row in rows]
    assert len({found.id for found in opened if found}) == len(rows)


def run_alone(connection: Connection, context: KnownContext, row: int) -> Outcome:
    """Makes one attempt at one row of several."""
    from outbox.rq_jobs import Delivery

    connection.execute("UPDATE outbox SET status = 'enqueued', delivery = 1 WHERE id = %s", [row])
    (claimed,) = claim(connection, [Delivery(row, 1)], "me", 60)
    own = replace(context, row_id=row, attempt=1)
    return attempt(claimed, registry(context.settings), own, 3600).outcome


def test_a_mail_is_not_begun_when_the_time_is_over(
    connection: Connection, context: KnownContext, mailbox: Mailbox
) -> None:
    """An attempt that has no time left is put off before it says anything to the mail server."""
    late = replace(context, deadline=time.monotonic() + 0.01)
    row = row_of(connection, "alice")
    time.sleep(0.02)
    outcome = run(connection, late, row)
    assert (outcome.status, outcome.attempts) == ("pending", 0)
    assert "the attempt's time is over" in str(outcome.error)
    assert not mailbox.mails


def test_a_step_with_the_mail_server_takes_no_longer_than_the_attempt(
    connection: Connection, context: KnownContext, mailbox: Mailbox
) -> None:
    """A mail server that says nothing is given up when the attempt's time is over, long before its own limit."""
    row = row_of(connection, "alice")
    with serve_script({"MAIL": None}) as server:
        mailer = Mailer(context.settings.model_copy(update={"smtp_server": endpoints.smtp_server(server.url)}))
        started = time.monotonic()
        outcome = run(connection, replace(context, deadline=started + 0.5, send=mailer.send), row)
    assert outcome.status == "pending"
    assert 0.4 < time.monotonic() - started < 3
    assert not mailbox.mails
