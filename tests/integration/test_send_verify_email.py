"""The handler of verification mails: which mail each user gets, and with which link."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from structlog.testing import capture_logs

from outbox import SkipRetry
from outbox.runtime import postgres
from outbox.runtime.settings import WorkerSettings
from outbox.signup.secret_code import is_secret_code
from outbox_worker.handlers import registry
from outbox_worker.handlers.send_verify_email import Recipient, _VerificationMail
from tests.conftest import Connection
from tests.support.attempts import KnownContext
from tests.support.mailbox import Mailbox, link_in
from tests.support.processes import add_users
from tests.support.rows import add_row
from tests.support.verification_mails import add_user, attempt_row, context_of
from tests.support.waiting import eventually


@pytest.fixture
def context(worker_settings: WorkerSettings) -> Iterator[KnownContext]:
    """A context for the handler."""
    with context_of(worker_settings) as opened:
        yield opened


def test_every_attempt_sends_the_same_mail(connection: Connection, context: KnownContext, mailbox: Mailbox) -> None:
    """One verification, one link, one Message-ID. The link works for its full lifetime from the latest attempt on."""
    row = add_user(connection, "alice")
    mailbox.data_reply = "451 4.3.0 rejected"
    assert attempt_row(connection, context, row).status == "pending"
    connection.execute("UPDATE verify_emails SET expired_at = now() - interval '1 hour'")
    mailbox.data_reply = "250 OK"
    assert attempt_row(connection, context, row).status == "done"
    assert attempt_row(connection, context, row).status == "done"

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


def test_a_user_who_does_not_exist_gets_no_mail(
    connection: Connection, context: KnownContext, mailbox: Mailbox
) -> None:
    """The row is dead, and its error names the user."""
    row = add_row(connection, task="send_verify_email", payload='{"username": "gone"}').row_id
    outcome = attempt_row(connection, context, row)
    assert (outcome.status, outcome.error) == ("dead", "the user gone does not exist")
    assert not mailbox.mails


def test_a_user_who_is_verified_gets_no_second_mail(
    connection: Connection, context: KnownContext, mailbox: Mailbox
) -> None:
    """If the outcome of a sent mail is lost, the user may click before the next attempt."""
    row = add_user(connection, "alice")
    assert attempt_row(connection, context, row).status == "done"
    connection.execute("UPDATE users SET is_email_verified = true")
    assert attempt_row(connection, context, row).status == "done"
    assert len(mailbox.mails) == 1


def test_a_connection_that_breaks_before_the_mail_costs_no_attempt(
    connection: Connection, context: KnownContext, mailbox: Mailbox, database_url: str
) -> None:
    """No mail was sent yet, so the same attempt opens the verification again on another connection."""
    row = add_user(connection, "alice")
    cut = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted AND relation = 'verify_emails'::regclass"
    locked = threading.Event()

    def cut_connection() -> None:
        with postgres.connect(database_url, "holder") as holder, holder.transaction():
            holder.execute("LOCK TABLE verify_emails")
            locked.set()
            eventually(lambda: holder.execute(cut).fetchall(), 10, "the handler's connection is cut")

    with ThreadPoolExecutor(1) as other:
        is_cut = other.submit(cut_connection)
        assert locked.wait(10)
        assert attempt_row(connection, context, row).status == "done"
        is_cut.result()
    assert len(mailbox.mails) == 1


def test_no_transaction_is_open_while_a_mail_is_sent(
    connection: Connection, context: KnownContext, mailbox: Mailbox
) -> None:
    """A slow mail server must not hold a snapshot or a lock in Postgres."""
    row = add_user(connection, "alice")
    rows: list[object] = []

    def send(message: object) -> None:
        rows.extend(
            connection.execute(
                "SELECT state FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid() AND state <> 'idle'"
            ).fetchall()
        )
        rows.extend(connection.execute("SELECT FROM verify_emails FOR UPDATE NOWAIT").fetchall())

    assert attempt_row(connection, replace(context, send=send), row).status == "done"
    assert rows == [{}], "no busy session, and a verification that can be locked"


def test_concurrent_users_each_get_their_own_mail(connection: Connection, context: KnownContext) -> None:
    """Verifications are opened in one statement, and not mixed up by a missing and a verified user among them."""
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


@pytest.mark.parametrize("emails", [["alice@example.com", "bob@example.com"], ["alice@example.com", "BOB@example.com"]])
def test_repeated_row_ids_misdirect_no_mail(
    connection: Connection, context: KnownContext, mailbox: Mailbox, emails: list[str]
) -> None:
    """If a new user's row has an old row's id, as after a restore, mail and link are the new user's."""
    row = add_user(connection, "alice")
    assert attempt_row(connection, context, row).status == "done"
    connection.execute("TRUNCATE outbox RESTART IDENTITY")
    connection.execute("DELETE FROM users WHERE username = 'bob'")
    add_users(connection, ["bob"])
    connection.execute("UPDATE users SET email = %s, full_name = 'Bob B' WHERE username = 'bob'", [emails[1]])
    assert connection.execute("SELECT id FROM outbox").fetchall() == [{"id": row}], "the id is the old one"

    with capture_logs() as lines:
        assert attempt_row(connection, context, row).status == "done"
        assert attempt_row(connection, context, row).status == "done", "the second attempt"

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


def test_repeated_row_ids_in_a_batch_misdirect_no_mail(connection: Connection, context: KnownContext) -> None:
    """Each verification of a batch is for its own user, even if other users had some of the row ids before."""
    add_users(connection, [f"old_{n}" for n in range(9)])
    rows = [row["id"] for row in connection.execute("SELECT id FROM outbox ORDER BY id")]
    for row in rows[::2]:
        assert attempt_row(connection, context, row).status == "done"
    connection.execute("UPDATE outbox SET payload = jsonb_build_object('username', 'new_' || id)")
    add_users(connection, [f"new_{row}" for row in rows])
    opened = _VerificationMail(context.settings)._open_all(context, [Recipient(row, f"new_{row}") for row in rows])
    assert [verification and verification.email for verification in opened] == [
        f"new_{row}@example.com" for row in rows
    ]
    assert len({verification.id for verification in opened if verification}) == len(rows)


def test_a_corrected_address_gets_the_mail(connection: Connection, context: KnownContext, mailbox: Mailbox) -> None:
    """The mail goes to the user's current address, with a link for it."""
    row = add_user(connection, "alice")
    assert attempt_row(connection, context, row).status == "done"
    connection.execute("UPDATE users SET email = 'corrected@example.com'")
    assert attempt_row(connection, context, row).status == "done"
    (old,), (new,) = mailbox.to("alice@example.com"), mailbox.to("corrected@example.com")
    assert link_in(old) != link_in(new)
    assert old["Message-ID"] != new["Message-ID"]
    parameters = parse_qs(urlsplit(link_in(new)).query)
    code, email_id = parameters["secret_code"][0], int(parameters["email_id"][0])
    assert is_secret_code(code, context.settings.secret_key, email_id, "alice", "corrected@example.com")


def test_a_used_link_is_not_sent_again(connection: Connection, context: KnownContext, mailbox: Mailbox) -> None:
    """A user who has to verify the same address again gets a new link."""
    row = add_user(connection, "alice")
    assert attempt_row(connection, context, row).status == "done"
    connection.execute("UPDATE verify_emails SET is_used = true")
    assert attempt_row(connection, context, row).status == "done"
    first, second = mailbox.to("alice@example.com")
    assert link_in(first) != link_in(second)
