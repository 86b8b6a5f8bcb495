"""Users who have not verified their address are deleted, if that is set: never before their mail, never in part."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import psycopg
import psycopg.sql
import pytest
import redis
from structlog.testing import capture_logs

from outbox.devstack.embedded import EmbeddedServer
from outbox.queries import query
from outbox.runtime import postgres
from outbox.runtime.settings import RelaySettings, ServiceSettings
from outbox.runtime.stop import Stop
from outbox.signup.secret_code import secret_code
from outbox_relay.expiry import INDEX, PAUSE, Expiry
from outbox_relay.loop import Relay
from tests.conftest import Connection
from tests.support.api import Api, serve
from tests.support.plans import MODES, plan_of
from tests.support.processes import SECRET_KEY
from tests.support.waiting import eventually

DAY = 86_400.0


@pytest.fixture
def connection(connection: Connection) -> Connection:
    """A connection to a database that has the index."""
    connection.execute(INDEX.encode())
    return connection


@pytest.fixture
def other(database_url: str) -> Iterator[Connection]:
    """A second connection: a worker's, a service's or another client's."""
    with postgres.connect(database_url, "other") as opened:
        yield opened


def sign_up(
    connection: Connection, name: str, *, age: float = 2 * DAY, status: str = "done", link: float = -DAY
) -> int:
    """Writes a user, a row of this status and a verification that expires in `link` seconds; returns the row's id."""
    found = connection.execute(
        """
        WITH added AS (
            INSERT INTO users (username, hashed_password, full_name, email, created_at)
            VALUES (%(name)s, 'hash', 'A User', %(name)s || '@example.com', now() - make_interval(secs => %(age)s))
        ), row AS (
            INSERT INTO outbox (task, payload, status, lease_until, done_at)
            VALUES ('send_verify_email', jsonb_build_object('username', %(name)s::text), %(status)s,
                    CASE %(status)s WHEN 'running' THEN now() END, CASE %(status)s WHEN 'done' THEN now() END)
            RETURNING id
        )
        SELECT id FROM row
        """,
        {"name": name, "age": age, "status": status},
    ).fetchone()
    assert found is not None
    connection.execute(
        "INSERT INTO verify_emails (outbox_id, username, email, expired_at)"
        " VALUES (%s, %s, %s, now() + make_interval(secs => %s))",
        [found["id"], name, f"{name}@example.com", link],
    )
    return int(found["id"])


def users(connection: Connection) -> list[str]:
    """Returns the names of all users."""
    return [row["username"] for row in connection.execute("SELECT username FROM users ORDER BY username")]


def count(connection: Connection, table: str) -> int:
    """Returns the number of rows of a table."""
    statement = psycopg.sql.SQL("SELECT count(*) AS rows FROM {}").format(psycopg.sql.Identifier(table))
    found = connection.execute(statement).fetchone()
    assert found is not None
    return int(found["rows"])


def expire(connection: Connection, retention: float = DAY) -> None:
    """Goes through all users once."""
    expiry = Expiry(retention)
    while expiry.step(connection) is not None:
        pass


def test_a_user_is_deleted_with_its_verification_and_row(connection: Connection) -> None:
    """This happens when its time is over, its mail sent and its link expired; other users stay."""
    sign_up(connection, "expired")
    sign_up(connection, "verified")
    sign_up(connection, "recent", age=DAY - 60)
    connection.execute("UPDATE users SET is_email_verified = true WHERE username = 'verified'")
    with capture_logs() as lines:
        expire(connection)
    assert users(connection) == ["recent", "verified"]
    assert count(connection, "verify_emails") == count(connection, "outbox") == 2
    assert [(line["event"], line["users"]) for line in lines] == [("unverified users deleted", 1)]


@pytest.mark.parametrize("status", ["pending", "enqueued", "running", "dead"])
def test_a_user_whose_mail_is_not_sent_stays(connection: Connection, status: str) -> None:
    """However old it is: the mail is still to be sent, or an operator has to decide about it."""
    sign_up(connection, "alice", age=400 * DAY, status=status)
    expire(connection)
    assert users(connection) == ["alice"]
    assert count(connection, "verify_emails") == 1
    assert connection.execute("SELECT status, xmax::text AS locked FROM outbox").fetchall() == [
        {"status": status, "locked": "0"}
    ]
    connection.execute("DELETE FROM outbox")  # as `outbox dead discard` does, or the retention of done rows
    expire(connection)
    assert users(connection) == []


def test_a_user_whose_link_is_valid_stays(connection: Connection) -> None:
    """The setting may be shorter than a link's lifetime, and the mail may have waited for days."""
    sign_up(connection, "alice", link=60)
    expire(connection, 1)
    assert users(connection) == ["alice"]


def test_a_user_who_never_had_a_verification_stays(connection: Connection) -> None:
    """No attempt at its mail has begun."""
    sign_up(connection, "alice")
    connection.execute("DELETE FROM verify_emails")
    expire(connection)
    assert users(connection) == ["alice"]


def test_a_row_of_another_user_is_neither_judged_nor_deleted(connection: Connection) -> None:
    """Ids are used again after a restore: the row with a verification's id may be a new user's."""
    row = sign_up(connection, "alice")
    connection.execute('UPDATE outbox SET payload = \'{"username": "bob"}\' WHERE id = %s', [row])
    other_row = sign_up(connection, "carol")
    connection.execute("UPDATE outbox SET task = 'other', status = 'dead', done_at = NULL WHERE id = %s", [other_row])
    expire(connection)
    assert users(connection) == []
    assert count(connection, "outbox") == 2


def test_users_who_stay_block_no_others(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round goes through all users in small steps, past those who stay; the next round starts again."""
    monkeypatch.setattr("outbox_relay.expiry.BATCH", 2)
    for number in range(5):
        sign_up(connection, f"stays_{number}", age=100 * DAY, status="dead")
    connection.execute("UPDATE users SET created_at = '-infinity' WHERE username < 'stays_3'")
    for number in range(3):
        sign_up(connection, f"goes_{number}")
    connection.execute("UPDATE users SET created_at = now() - interval '2 days' WHERE username LIKE 'goes%'")
    expiry = Expiry(DAY)
    steps = [expiry.step(connection) for _ in range(5)]
    assert steps == [PAUSE] * 4 + [None]
    assert users(connection) == [f"stays_{number}" for number in range(5)]
    connection.execute("UPDATE outbox SET status = 'done', done_at = now()")
    for _ in range(3):
        expiry.step(connection)
    assert users(connection) == []


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service on the test's database."""
    with serve(service_settings) as served:
        yield served


def test_a_verification_at_the_same_time_comes_first_or_last(
    connection: Connection, other: Connection, api: Api
) -> None:
    """A user whose link is being used is skipped; the link of a user who is being deleted is no longer valid."""
    sign_up(connection, "first")
    sign_up(connection, "last", link=60)
    with other.transaction():
        other.execute("UPDATE users SET is_email_verified = true WHERE username = 'first'")
        expire(connection)
        assert users(connection) == ["first", "last"]
    expire(connection)
    assert users(connection) == ["first", "last"]

    found = connection.execute("SELECT id FROM verify_emails WHERE username = 'last'").fetchone()
    assert found is not None
    link = {"email_id": found["id"], "secret_code": secret_code(SECRET_KEY, found["id"], "last", "last@example.com")}
    with ThreadPoolExecutor(1) as thread:
        with other.transaction():
            held = {"retention": DAY, "after": "-infinity", "after_username": "", "left_out": [], "batch": 9}
            assert len(other.execute(query("unverified_users"), held).fetchall()) == 1
            answer = thread.submit(
                api.client.post, "/v1/verify_email", params=link, headers={"Accept": "application/json"}
            )
            waiting = "SELECT FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted"
            eventually(lambda: connection.execute(waiting).fetchall(), 10, "the request waits")
            other.execute("UPDATE verify_emails SET expired_at = now()")  # as if it had just run out
            assert other.execute(query("delete_expired_users"), {"usernames": ["last"]}).fetchall()
        assert answer.result(10).status_code == 400
    assert users(connection) == ["first"]
    assert not api.events("statement refused")


def test_a_link_that_a_worker_opens_at_the_same_time_is_kept(connection: Connection, other: Connection) -> None:
    """While a worker opens a verification again, its user is skipped; afterwards the new time is seen."""
    row = sign_up(connection, "alice", status="pending")
    given = {"outbox_ids": [row], "usernames": ["alice"], "lifetime": 900.0}
    with other.transaction():
        other.execute(query("open_verifications"), given)
        other.execute("UPDATE outbox SET status = 'done', done_at = now()")
        expire(connection)
        assert users(connection) == ["alice"]
    expire(connection)
    assert users(connection) == ["alice"]


def test_a_foreign_key_to_users_keeps_its_own_user_alone(
    connection: Connection,
) -> None:
    """Without ON DELETE, the user that it refers to stays and is logged, and the others are deleted."""
    connection.execute("CREATE TABLE orders (username text REFERENCES users)")
    for number in range(8):
        sign_up(connection, f"user_{number}")
    connection.execute("INSERT INTO orders VALUES ('user_3')")
    with capture_logs() as lines:
        expire(connection)
    assert users(connection) == ["user_3"]
    (line,) = [line for line in lines if line["event"] == "unverified users cannot be deleted"]
    assert (line["users"], "orders" in line["error"]) == (["user_3"], True)


def test_without_the_index_no_user_expires_and_one_line_says_what_to_run(connection: Connection) -> None:
    """Otherwise each step would read all users. An index that is not valid does not count."""
    sign_up(connection, "alice")
    connection.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'users_unverified'::regclass")
    with capture_logs() as lines:
        expire(connection)
        connection.execute("DROP INDEX users_unverified")
        expire(connection)
    assert users(connection) == ["alice"]
    assert {(line["event"], line["log_level"]) for line in lines} == {("unverified users cannot expire", "error")}
    connection.execute(lines[0]["run"].encode())
    expire(connection)
    assert users(connection) == []


@pytest.fixture
def start(relay_settings: RelaySettings, redis_client: redis.Redis) -> Iterator[Callable[..., list[Any]]]:
    """Runs a relay with changed settings in a thread until the test ends, and returns what it logs."""
    stop = Stop()
    threads: list[Thread] = []
    with capture_logs() as captured:

        def run(**changes: Any) -> list[Any]:
            settings = relay_settings.model_copy(update={"poll_interval": 0.2, **changes})
            threads.append(Thread(target=Relay(settings, stop).run, name="relay", daemon=True))
            threads[-1].start()
            return captured

        try:
            yield run
            assert all(thread.is_alive() for thread in threads), captured
        finally:
            stop.request()
            for thread in threads:
                thread.join(10)


def old_row(connection: Connection) -> int:
    """Writes a row that the retention of done rows deletes."""
    found = connection.execute(
        "INSERT INTO outbox (task, payload, status, done_at) VALUES ('t', '{}', 'done', '2000-01-01') RETURNING id"
    ).fetchone()
    assert found is not None
    return int(found["id"])


def test_it_is_off_unless_it_is_set(connection: Connection, start: Callable[..., list[Any]]) -> None:
    """Without the setting a relay deletes old rows and no users; with it, both."""
    sign_up(connection, "alice")
    old_row(connection)
    start()
    eventually(lambda: count(connection, "outbox") == 1, 10, "the retention of done rows")
    assert users(connection) == ["alice"]
    start(unverified_retention=DAY)
    eventually(lambda: not users(connection), 10, "the user is gone")


def test_without_the_right_one_line_is_logged_and_the_rest_goes_on(
    file_postgres: EmbeddedServer, start: Callable[..., list[Any]]
) -> None:
    """One line names the duty and the missing right; the grants of the docs make it work."""
    docs = Path("docs/deploy.md").read_text(encoding="utf-8")
    (narrow,) = re.findall(r"```sql\n(GRANT USAGE.*?)```", docs, re.DOTALL)
    (further,) = re.findall(r"```sql\n(CREATE INDEX.*?)```", docs, re.DOTALL)
    index, *grants = further.strip().split(";\n")
    assert index == INDEX
    with postgres.connect(file_postgres.url, "test") as connection:
        for role in ("outbox_service", "outbox_relay", "outbox_worker"):
            connection.execute(f"CREATE ROLE {role} LOGIN".encode())
        connection.execute(narrow.encode())
        connection.execute(index.encode())
        sign_up(connection, "alice")
        old_row(connection)
        url = file_postgres.url.replace("outbox@", "outbox_relay@")
        lines = start(database_url=url, unverified_retention=DAY)
        eventually(lambda: [line for line in lines if line["event"] == "duty refused"], 10, "the line")
        eventually(lambda: count(connection, "outbox") == 1, 10, "the retention of done rows")
        (line,) = [line for line in lines if line["event"] == "duty refused"]
        assert line["duty"] == "expiry of unverified users"
        assert "permission denied for table users" in line["error"]
        assert users(connection) == ["alice"]
        connection.execute(";\n".join(grants).encode())
        eventually(lambda: not users(connection), 20, "the user is gone")
        assert count(connection, "outbox") == 0


@pytest.mark.once
def test_no_step_reads_all_users(connection: Connection) -> None:
    """Among 40,000 users, most of them verified, it finds the others by the index, and their rows by name."""
    connection.execute(
        "INSERT INTO users (username, hashed_password, full_name, email, is_email_verified, created_at)"
        " SELECT 'user_' || n, 'hash', 'A User', n || '@example.com', n % 5 > 0, now() - make_interval(secs => n)"
        " FROM generate_series(1, 40000) AS n"
    )
    connection.execute(
        "INSERT INTO verify_emails (outbox_id, username, email, expired_at)"
        " SELECT n, 'user_' || n, n || '@example.com', now() FROM generate_series(1, 40000) AS n"
    )
    connection.execute(
        "INSERT INTO outbox (task, payload, status, done_at) SELECT 't', '{}', 'done', now()"
        " FROM generate_series(1, 40000)"
    )
    connection.execute("ANALYZE users, verify_emails, outbox")
    given = {"retention": DAY, "after": "-infinity", "after_username": "", "left_out": ["x"], "batch": 1000}
    names = [f"user_{5 * n}" for n in range(1, 1001)]
    for name, parameters, index in (
        ("unverified_users", given, "users_unverified"),
        ("unverified_users", {**given, "after": "2026-01-01", "after_username": "user_5"}, "users_unverified"),
        ("delete_expired_users", {"usernames": names}, "users_pkey"),
    ):
        for mode in MODES:
            found = plan_of(connection, name, parameters, mode)
            costly = [node["Node Type"] for node in found if node["Node Type"] in {"Seq Scan", "Sort"}]
            assert not costly, found
            assert index in {node.get("Index Name") for node in found}
