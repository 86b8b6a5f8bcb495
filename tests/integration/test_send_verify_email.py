"""The verification mail's handler: the same link at every attempt, and nobody who should get none."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from psycopg_pool import ConnectionPool

from outbox import Context
from outbox.settings import WorkerSettings
from outbox.verification import is_secret_code
from tests.conftest import Connection
from tests.integration.test_claim import add_row
from tests.support.mailbox import Mailbox, link_in
from tests.support.processes import add_users
from worker.attempt import Outcome, attempt
from worker.claim import claim
from worker.handlers import registry
from worker.mail import Mailer


@pytest.fixture
def context(worker_settings: WorkerSettings) -> Iterator[Context]:
    """What the handler is given, with links under a path."""
    settings = worker_settings.model_copy(update={"public_url": "https://example.com/app"})
    mailer = Mailer(settings)
    with ConnectionPool[Any](
        settings.database_url, min_size=0, max_size=2, kwargs={"autocommit": True}, open=True
    ) as pool:
        yield Context(row=0, attempt=1, database=pool, send=mailer.send, settings=settings)
    mailer._drop()


def run(connection: Connection, context: Context, row: int) -> Outcome:
    """Makes one attempt at a user's row, as if it had been handed over just now."""
    from dataclasses import replace

    from outbox.jobs import Delivery

    connection.execute("UPDATE outbox SET status = 'enqueued', delivery = 1, lease_until = NULL, run_at = now()")
    (claimed,) = claim(connection, [Delivery(row, 1)], "me", 60)
    return attempt(claimed, registry(), replace(context, row=row, attempt=claimed.attempt))


def row_of(connection: Connection, name: str) -> int:
    """Creates a user and returns the row's id."""
    add_users(connection, [name])
    found = connection.execute("SELECT id FROM outbox").fetchone()
    assert found is not None
    return int(found["id"])


def test_every_attempt_sends_the_same_mail(connection: Connection, context: Context, mailbox: Mailbox) -> None:
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


def test_a_user_who_is_gone_gets_none(connection: Connection, context: Context, mailbox: Mailbox) -> None:
    """The row is dead with a sentence that names the user."""
    row = add_row(connection, task="send_verify_email", payload='{"username": "gone"}').row
    outcome = run(connection, context, row)
    assert (outcome.status, outcome.error) == ("dead", "the user gone is gone")
    assert not mailbox.mails


def test_a_user_who_has_verified_meanwhile_gets_no_second_mail(
    connection: Connection, context: Context, mailbox: Mailbox
) -> None:
    """An attempt that died after its mail went out is repeated; the user may have been quicker."""
    row = row_of(connection, "alice")
    assert run(connection, context, row).status == "done"
    connection.execute("UPDATE users SET is_email_verified = true")
    assert run(connection, context, row).status == "done"
    assert len(mailbox.mails) == 1


def test_a_refused_address_is_dead_and_a_server_that_is_down_is_not(
    connection: Connection, context: Context, mailbox: Mailbox
) -> None:
    """What the server says of the address decides; what it says of itself is tried again."""
    row = row_of(connection, "alice")
    mailbox.rcpt_reply = "450 4.2.1 busy"
    assert run(connection, context, row).status == "pending"
    mailbox.rcpt_reply = "550 5.1.1 no such user"
    outcome = run(connection, context, row)
    assert outcome.status == "dead"
    assert "550 5.1.1 no such user" in str(outcome.error)


def test_no_transaction_is_open_while_it_talks_to_the_mail_server(
    connection: Connection, context: Context, mailbox: Mailbox
) -> None:
    """A slow mail server must not hold a snapshot or a lock in Postgres."""
    from dataclasses import replace

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
