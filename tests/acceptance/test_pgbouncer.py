"""Postgres behind PgBouncer in transaction mode, where each transaction may get another session."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import LiteralString

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from structlog.testing import capture_logs

from outbox.queries import query, sql_folder
from outbox.runtime import pooler, postgres, schema
from outbox.runtime.migrations import migrate
from tests.conftest import Connection, short_folder
from tests.support.mailbox import Mailbox, link_in
from tests.support.pgbouncer import PROGRAM, pgbouncer
from tests.support.processes import Stack, add_users
from tests.support.servers import with_database
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.unmeasured,
    pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed; it is in Debian's package pgbouncer"),
]

POOLED = {"OUTBOX_TRANSACTION_POOLING": "true"}


@pytest.fixture(scope="module")
def bouncer(server_url: str) -> Iterator[Callable[[str], str]]:
    """Returns a database's URL through a PgBouncer with four connections to it."""
    with short_folder() as folder, pgbouncer(folder, server_url) as url:
        yield lambda direct: with_database(url, _name(direct))


@pytest.fixture
def pooled_url(bouncer: Callable[[str], str], database_url: str) -> str:
    """The URL of the test's database through PgBouncer."""
    return bouncer(database_url)


def test_all_three_work_through_it(stack: Stack, connection: Connection, mailbox: Mailbox, pooled_url: str) -> None:
    """With four shared sessions, users get their mails, many at once; each relay logs once that it polls."""
    stack.environment |= {"DATABASE_URL": pooled_url, **POOLED, "OUTBOX_CONCURRENCY": "8"}
    processes = stack.run_all("service", "relay", "relay", "worker")
    created = [f"created{n}" for n in range(8)]
    with ThreadPoolExecutor(8) as clients:
        assert [status for status, _ in clients.map(stack.create_user, created)] == [201] * 8
    added = [f"added{n}" for n in range(200)]
    add_users(connection, added)

    eventually(lambda: len(mailbox.mails) == 208, 30, "all mails")
    assert {recipient for recipient, _ in mailbox.mails} == {f"{name}@example.com" for name in created + added}
    link = link_in(mailbox.to("created7@example.com")[0])
    assert stack.get(link.removeprefix(stack.url)) == (200, {"is_verified": True})
    eventually(lambda: _statuses(connection) == {"done"}, 10)

    for process in processes:
        process.send(signal.SIGTERM)
    for process in processes:
        assert process.wait() == 0
        assert "prepared statement" not in process.text()
        assert not process.events("Postgres is away")
        assert not process.events("writing outcomes failed")
    polling = [line for process in processes for line in process.events("polling without LISTEN")]
    assert [(line["process"], line["level"], line["why"]) for line in polling] == [
        ("relay", "info", "OUTBOX_TRANSACTION_POOLING is set")
    ] * 2


@pytest.mark.parametrize("module", ["service", "relay", "worker"])
def test_without_the_setting_a_sentence_says_what_to_set(stack: Stack, pooled_url: str, module: str) -> None:
    """Otherwise processes would share sessions unknowingly, and execute each other's prepared statements."""
    process = stack.start(module, DATABASE_URL=pooled_url)
    assert process.wait() == 2
    assert "set OUTBOX_TRANSACTION_POOLING=true" in process.text().splitlines()[-1]
    assert "Traceback" not in process.text()


@pytest.mark.parametrize("module", ["service", "relay", "worker"])
def test_a_refused_process_leaves_no_limits_behind(stack: Stack, pooled_url: str, module: str) -> None:
    """Its limits must not end transactions of others."""
    assert _limits(pooled_url) == {("0", "0")}
    assert stack.start(module, DATABASE_URL=pooled_url).wait() == 2
    assert _limits(pooled_url) == {("0", "0")}


def test_the_command_says_what_to_set(pooled_url: str) -> None:
    """`outbox dead` also leaves no limits behind, and works once the setting is set."""
    command = [sys.executable, "-m", "outbox", "dead", "list"]
    environment = {**os.environ, "DATABASE_URL": pooled_url}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "set OUTBOX_TRANSACTION_POOLING=true" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert _limits(pooled_url) == {("0", "0")}
    listed = subprocess.run(command, env=environment | POOLED, capture_output=True, text=True, check=True)
    assert "no dead rows" in listed.stdout


def test_session_mode_needs_no_setting(server_url: str, database_url: str) -> None:
    """A client has its own session there, with its limits, hints and prepared statements."""
    with short_folder() as folder, pgbouncer(folder, server_url, "session") as url:
        bounced_url = with_database(url, _name(database_url))
        with pooler.connect_checked(bounced_url, "test", pooled=False) as connection:
            assert connection.execute(query("backend_pid")).fetchone() != {"session": connection.info.backend_pid}
            assert _show(connection, "lock_timeout") == "10s"


def test_in_session_mode_one_session_is_enough(
    server_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the pool has no second session, the mode cannot be detected, and the connection works anyway."""
    monkeypatch.setattr(postgres, "ANSWER_LIMIT", 0.5)
    with short_folder() as folder, pgbouncer(folder, server_url, "session") as url, ExitStack() as stack:
        bounced_url = with_database(url, _name(database_url))
        for _ in range(3):
            stack.enter_context(postgres.connect(bounced_url, "test"))
        last = stack.enter_context(pooler.connect_checked(bounced_url, "test", pooled=False))
        assert _show(last, "lock_timeout") == "10s"


def test_shared_sessions_are_not_changed(bouncer: Callable[[str], str], database_url: str) -> None:
    """No limit and no prepared statement stays in a session that the next transaction may not get."""
    with postgres.connect(bouncer(database_url), "test", pooled=True) as connection:
        for _ in range(10):
            connection.execute("SELECT %s::integer", [1])
        assert connection.execute("SELECT * FROM pg_prepared_statements").fetchall() == []
        assert connection.execute("SHOW lock_timeout").fetchone() == {"lock_timeout": "0"}


def test_limits_that_the_role_lacks_are_logged(bouncer: Callable[[str], str], database_url: str) -> None:
    """A warning has the statements that give the role the limits that sessions otherwise get."""
    with postgres.connect(bouncer(database_url), "test", pooled=True) as connection, capture_logs() as lines:
        pooler.warn_about_missing_settings(connection)
    (line,) = lines
    assert line["event"] == "sessions lack settings"
    idle, lock = line["run"].split("; ")
    assert idle == "ALTER ROLE outbox SET idle_in_transaction_session_timeout = '30s'"
    assert lock == "ALTER ROLE outbox SET lock_timeout = '10s'"


def test_a_role_that_has_limits_may_migrate(
    bouncer: Callable[[str], str], create_database: Callable[[str | None], str]
) -> None:
    """Short limits do not end a migration that waits for another; it changes no limits and reports none missing."""
    direct = create_database(None)
    with psycopg.connect(direct, autocommit=True) as connection:
        for limit in ("idle_in_transaction_session_timeout", "lock_timeout"):
            connection.execute(f"ALTER ROLE CURRENT_USER IN DATABASE {_name(direct)} SET {limit} = '300ms'")
    url = bouncer(direct)
    with psycopg.connect(direct) as first, ThreadPoolExecutor(1) as threads:
        first.execute((sql_folder() / "records.sql").read_bytes())
        first.commit()
        first.execute(query("unlimit_transaction"))
        first.execute(query("lock_migrations"))
        second = threads.submit(migrate, url)
        with pytest.raises(TimeoutError):
            second.result(1)
        first.rollback()
        assert second.result(20) == schema.migrations()
    assert migrate(url) == []
    assert _limits(url) == {("300ms", "300ms")}
    with postgres.connect(url, "test", pooled=True) as pooled, capture_logs() as lines:
        pooler.warn_about_missing_settings(pooled)
    assert lines == []


def _limits(pooled_url: str) -> set[tuple[str, str]]:
    """Returns the limits of all four of PgBouncer's sessions, with as many transactions open at once."""
    with ExitStack() as stack:
        connections = [stack.enter_context(postgres.connect(pooled_url, "test", pooled=True)) for _ in range(4)]
        for connection in connections:
            stack.enter_context(connection.transaction())
        return {
            (_show(each, "lock_timeout"), _show(each, "idle_in_transaction_session_timeout")) for each in connections
        }


def _show(connection: Connection, name: LiteralString) -> str:
    row = connection.execute(f"SHOW {name}").fetchone()
    assert row is not None
    return str(row[name])


def _name(database_url: str) -> str:
    return str(conninfo_to_dict(database_url)["dbname"])


def _statuses(connection: Connection) -> set[str]:
    return {row["status"] for row in connection.execute("SELECT status FROM outbox")}
