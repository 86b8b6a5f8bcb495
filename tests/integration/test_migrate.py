"""Migrations: one at a time, once, and known to have happened."""

import getpass
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any, NoReturn

import psycopg
import psycopg.sql
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from structlog.testing import capture_logs

from outbox.errors import LockedError, NotMigratedError, RightsError, UnsupportedDatabaseError
from outbox.queries import query, sql_folder
from outbox.runtime import migrations, postgres
from outbox.runtime.migrations import migrate
from tests.support.waiting import eventually

Connection = psycopg.Connection[dict[str, Any]]
CreateDatabase = Callable[[str | None], str]


@pytest.fixture
def empty_url(create_database: CreateDatabase) -> str:
    """A database without anything."""
    return create_database(None)


@pytest.fixture(scope="module")
def table(create_database: CreateDatabase, template: str) -> Iterator[Connection]:
    """A connection to a database that tests leave as they found it."""
    with postgres.connect(create_database(template), "test") as opened:
        yield opened


def test_four_that_migrate_at_once_do_no_harm(empty_url: str) -> None:
    """Each migration is applied by exactly one of them, and none fails."""
    barrier = Barrier(4)

    def run() -> list[str]:
        barrier.wait(10)
        return migrate(empty_url)

    with ThreadPoolExecutor(4) as threads:
        applied = [name for future in [threads.submit(run) for _ in range(4)] for name in future.result(30)]
    assert sorted(applied) == postgres.migrations()


def test_two_commands_at_once_do_no_harm(empty_url: str) -> None:
    """`outbox migrate` twice at the same moment: both succeed, and the schema is there."""
    environment = {**os.environ, "DATABASE_URL": empty_url}
    command = [sys.executable, "-m", "outbox", "migrate"]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=30)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert all("db migrated" in output for output in outputs)
    with postgres.connect(empty_url, "test") as connection:
        postgres.check_migrated(connection)


def test_a_second_run_does_nothing(database_url: str, connection: Connection) -> None:
    """What is applied stays as it is."""
    before = connection.execute("SELECT * FROM _yoyo_migration").fetchall()
    assert migrate(database_url) == []
    assert connection.execute("SELECT * FROM _yoyo_migration").fetchall() == before


def test_a_kill_before_the_record_leaves_nothing(empty_url: str) -> None:
    """Killed when a migration has made its tables and is about to record it, it has made none. Another run does."""
    with (
        postgres.connect(empty_url, "test") as connection,
        psycopg.connect(empty_url) as holder,
    ):
        connection.execute((sql_folder() / "records.sql").read_bytes())
        holder.execute(query("record_migration"), {"migration": postgres.migrations()[0]})
        environment = {**os.environ, "DATABASE_URL": empty_url}
        running = subprocess.Popen(
            [sys.executable, "-m", "outbox", "migrate"], env=environment, stdout=subprocess.DEVNULL
        )
        eventually(lambda: waits_to_record(connection), 20, "it is about to record a migration")
        running.kill()
        running.wait()
        holder.rollback()
        assert migrate(empty_url) == postgres.migrations()
        postgres.check_migrated(connection)


def waits_to_record(connection: Connection) -> bool:
    """Whether a session waits for another one that has written the same record, and not committed it."""
    return bool(connection.execute("SELECT FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted").fetchall())


@pytest.mark.parametrize("applied", [1, 4])
def test_a_database_that_was_left_unrecorded_is_mended(empty_url: str, applied: int) -> None:
    """Applied by an earlier version that was cut short before the record, or restored without the records."""
    with postgres.connect(empty_url, "test") as connection, capture_logs() as lines:
        connection.execute((sql_folder() / "records.sql").read_bytes())
        connection.execute("CREATE TABLE yoyo_lock (locked integer PRIMARY KEY, ctime timestamp, pid integer)")
        connection.execute("INSERT INTO yoyo_lock VALUES (1, now(), 999999)")
        for name in postgres.migrations()[:applied]:
            connection.execute((sql_folder() / "migrations" / f"{name}.sql").read_bytes())
        connection.execute("INSERT INTO outbox (task, payload) VALUES ('t', '{}')")

        assert migrate(empty_url) == postgres.migrations()
        postgres.check_migrated(connection)
        assert connection.execute("SELECT task FROM outbox").fetchall() == [{"task": "t"}]
    (line,) = [line for line in lines if line["log_level"] != "info"]
    assert (line["event"], line["migration"]) == ("migration was not recorded", postgres.migrations()[0])


def test_tables_that_are_not_ours_are_not_taken_for_ours(empty_url: str) -> None:
    """An application's own table of users is an error and no unrecorded migration, and nothing is made beside it."""
    with postgres.connect(empty_url, "test") as connection:
        connection.execute("CREATE TABLE users (id integer)")
        with pytest.raises(psycopg.errors.DuplicateTable, match="users"):
            migrate(empty_url)
        assert connection.execute("SELECT to_regclass('outbox') AS made").fetchone() == {"made": None}
        assert connection.execute("SELECT FROM _yoyo_migration").fetchall() == []


def test_no_name_of_host_or_user_is_looked_up(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS may say nothing for long, and a container's uid may have no name."""

    def unknown(*_: object) -> NoReturn:
        raise OSError("no name")

    for name in ("getfqdn", "gethostbyaddr", "gethostname"):
        monkeypatch.setattr(socket, name, unknown)
    monkeypatch.setattr(getpass, "getuser", unknown)
    assert migrate(empty_url) == postgres.migrations()


@pytest.fixture
def old_url(create_database: CreateDatabase, template: str) -> str:
    """A database that lacks all migrations but the first; the others change what is in use, and bear a second time."""
    url = create_database(template)
    with psycopg.connect(url) as connection:
        connection.execute("DELETE FROM _yoyo_migration WHERE migration_id <> %s", [postgres.migrations()[0]])
    return url


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Migrations that wait for a lock, and between two tries, for moments only."""
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT", 0.2)
    monkeypatch.setattr(migrations, "PAUSE", 0.1)
    return monkeypatch


@contextmanager
def dump(database_url: str) -> Iterator[None]:
    """Holds what pg_dump does for as long as it runs: the lock of who reads the table."""
    with psycopg.connect(database_url) as connection:
        connection.execute("LOCK TABLE outbox IN ACCESS SHARE MODE")
        yield


def waits_for_table(connection: Connection) -> bool:
    """Whether somebody wants the outbox alone, and others have it."""
    return bool(
        connection.execute(
            "SELECT FROM pg_locks WHERE relation = 'outbox'::regclass AND mode = 'AccessExclusiveLock' AND NOT granted"
        ).fetchall()
    )


def test_rows_are_written_while_a_migration_waits(old_url: str, impatient: pytest.MonkeyPatch) -> None:
    """Behind a dump it lets those go first who came after it, again and again, and is applied when the dump is done."""
    impatient.setattr(migrations, "TRIES", 1000)
    with (
        postgres.connect(old_url, "test") as connection,
        capture_logs() as lines,
        ThreadPoolExecutor(1) as threads,
    ):
        with dump(old_url):
            migrated = threads.submit(migrate, old_url)
            for _ in range(3):
                eventually(lambda: waits_for_table(connection), 10, "the migration waits for the dump")
                connection.execute("INSERT INTO outbox (task, payload) VALUES ('t', '{}')")
            assert not migrated.done()
        assert migrated.result(20) == postgres.migrations()[1:]
    first = next(line for line in lines if line["event"] == "migration waits for a lock")
    assert (first["log_level"], first["migration"], first["next_try"]) == ("warning", postgres.migrations()[1], 0.1)


def test_a_migration_that_waits_in_vain_is_not_applied(old_url: str, impatient: pytest.MonkeyPatch) -> None:
    """After some tries a sentence says what to do; nothing of the migration is left, and another run applies it."""
    impatient.setattr(migrations, "TRIES", 2)

    def state() -> list[Any]:
        return [
            connection.execute("SELECT oid FROM pg_constraint WHERE conrelid = 'outbox'::regclass").fetchall(),
            connection.execute("SELECT * FROM _yoyo_migration").fetchall(),
        ]

    with postgres.connect(old_url, "test") as connection:
        before = state()
        with dump(old_url), capture_logs() as lines, pytest.raises(LockedError) as caught:
            migrate(old_url)
        assert state() == before
    assert postgres.migrations()[1] in str(caught.value)
    assert "run 'outbox migrate' again" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [line["event"] for line in lines] == ["migration waits for a lock"]
    assert migrate(old_url) == postgres.migrations()[1:]


def test_each_migration_has_tries_of_its_own(old_url: str, impatient: pytest.MonkeyPatch) -> None:
    """Of two tries, one that an earlier migration has used up is not missing to a later one."""
    impatient.setattr(migrations, "TRIES", 2)
    apply, refused = migrations._apply, set[str]()

    def apply_at_the_second_try(connection: Connection, name: str) -> bool:
        if name not in {*refused, postgres.migrations()[0]}:
            refused.add(name)
            raise psycopg.errors.LockNotAvailable
        return apply(connection, name)

    impatient.setattr(migrations, "_apply", apply_at_the_second_try)
    with capture_logs() as lines:
        assert migrate(old_url) == postgres.migrations()[1:]
    waits = [line["migration"] for line in lines if line["event"] == "migration waits for a lock"]
    assert waits == postgres.migrations()[1:]


@pytest.fixture
def long_ids_url(create_database: CreateDatabase, template: str) -> str:
    """A database of a version that had no limit for request ids, with a row in each status and long ids in all."""
    url = create_database(template)
    with psycopg.connect(url) as connection:
        connection.execute("DELETE FROM _yoyo_migration WHERE migration_id > '0006'")
        connection.execute("ALTER TABLE outbox DROP CONSTRAINT IF EXISTS outbox_request_id_valid")
        connection.execute(
            """
            INSERT INTO outbox (task, payload, status, request_id, lease_until, done_at)
            SELECT 't', '{}', status, repeat('é', 3000000), CASE status WHEN 'running' THEN now() END,
                   CASE status WHEN 'done' THEN now() END
            FROM unnest(ARRAY['pending', 'enqueued', 'running', 'done', 'dead']) AS status
            """
        )
        connection.execute(
            "INSERT INTO outbox (task, payload, request_id) VALUES ('t', '{}', 'short'), ('t', '{}', NULL)"
        )
    return url


def test_request_ids_of_earlier_versions_are_cut(long_ids_url: str) -> None:
    """Else no later update of their rows would bear the limit: they could be neither handed over nor marked."""
    assert len(migrate(long_ids_url)) == 2
    with postgres.connect(long_ids_url, "test") as connection:
        connection.execute("UPDATE outbox SET delivery = delivery + 1")
        ids = [row["request_id"] for row in connection.execute("SELECT request_id FROM outbox ORDER BY id")]
        assert ids == ["é" * 200] * 5 + ["short", None]
        valid = "SELECT convalidated FROM pg_constraint WHERE conname = 'outbox_request_id_valid'"
        assert connection.execute(valid).fetchall() == [{"convalidated": True}]


def test_rows_are_written_while_long_request_ids_are_cut(long_ids_url: str, impatient: pytest.MonkeyPatch) -> None:
    """It waits for who has such a row locked, and nobody waits for it; longer ids are refused by then."""
    impatient.setattr(migrations, "TRIES", 1000)
    with (
        postgres.connect(long_ids_url, "test") as connection,
        ThreadPoolExecutor(1) as threads,
    ):
        assert migrations._apply(connection, "0006_limited_request_ids")
        with psycopg.connect(long_ids_url) as holder:
            holder.execute("SELECT FROM outbox WHERE id = 1 FOR UPDATE")
            migrated = threads.submit(migrate, long_ids_url)
            waits = "SELECT FROM pg_stat_activity WHERE query LIKE '%%left(request_id%%' AND wait_event_type = 'Lock'"
            eventually(lambda: connection.execute(waits + " AND pid <> pg_backend_pid()").fetchall(), 10, "it waits")
            connection.execute("SET lock_timeout = '2s'")
            connection.execute("INSERT INTO outbox (task, payload) VALUES ('t', '{}')")
            connection.execute("UPDATE outbox SET run_at = now() WHERE id = 6")
            with pytest.raises(psycopg.errors.CheckViolation):
                connection.execute(
                    "INSERT INTO outbox (task, payload, request_id) VALUES ('t', '{}', repeat('x', 201))"
                )
        assert migrated.result(20) == ["0007_cut_request_ids"]


@pytest.fixture
def other_url(empty_url: str) -> Iterator[str]:
    """An empty database, as a role that may only look at its schema."""
    name = f"outbox_test_{secrets.token_hex(6)}"
    role = psycopg.sql.Identifier(name)
    with psycopg.connect(empty_url, autocommit=True) as connection:
        for statement in (
            "CREATE ROLE {} LOGIN PASSWORD 'of a test'",
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
            "GRANT USAGE ON SCHEMA public TO {}",
        ):
            connection.execute(psycopg.sql.SQL(statement).format(role))
        yield make_conninfo(empty_url, user=name, password="of a test")
        connection.execute(psycopg.sql.SQL("DROP OWNED BY {}").format(role))
        connection.execute(psycopg.sql.SQL("DROP ROLE {}").format(role))


def test_a_role_that_may_create_no_tables_is_told_what_it_lacks(empty_url: str, other_url: str) -> None:
    """The sentence is the statement that gives it the right; nothing is done before, and all of it afterwards."""
    with pytest.raises(RightsError, match="run GRANT CREATE ON SCHEMA public TO outbox_test_") as caught:
        migrate(other_url)
    grant = str(caught.value).partition("run ")[2].partition(",")[0]
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute(grant)
    assert migrate(other_url) == postgres.migrations()


def test_a_role_without_any_schema_is_told(empty_url: str, other_url: str) -> None:
    """Where its search_path names no schema that it may use, it hears that."""
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
        role = psycopg.sql.Identifier(str(conninfo_to_dict(other_url)["user"]))
        connection.execute(psycopg.sql.SQL("REVOKE USAGE ON SCHEMA public FROM {}").format(role))
    with pytest.raises(RightsError, match="search_path"):
        migrate(other_url)


def test_a_migrated_database_needs_no_right_to_create(empty_url: str, other_url: str) -> None:
    """Whoever owns the tables may run it again, where there is nothing to do."""
    role = psycopg.sql.Identifier(str(conninfo_to_dict(other_url)["user"]))
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute(psycopg.sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(role))
        assert migrate(other_url) == postgres.migrations()
        connection.execute(psycopg.sql.SQL("REVOKE CREATE ON SCHEMA public FROM {}").format(role))
    assert migrate(other_url) == []


def test_an_unmigrated_database_is_told_from_a_migrated_one(empty_url: str) -> None:
    """The sentence says which command to run."""
    with postgres.connect(empty_url, "test") as connection:
        with pytest.raises(NotMigratedError, match="run 'outbox migrate'"):
            postgres.check_migrated(connection)
        migrate(empty_url)
        postgres.check_migrated(connection)


def test_a_database_that_is_not_in_utf8_is_refused(foreign_url: str) -> None:
    """It could not hold every name: nothing is made in it, and the sentence says how to make a better one."""
    with pytest.raises(UnsupportedDatabaseError, match="ENCODING 'UTF8'"):
        migrate(foreign_url)
    with postgres.connect(foreign_url, "test") as connection:
        assert connection.execute("SELECT FROM pg_class WHERE relname ~ '^(_?yoyo|outbox|users)'").fetchall() == []
        with pytest.raises(UnsupportedDatabaseError, match=connection.info.dbname):
            postgres.check_migrated(connection)


def test_every_connection_speaks_utf8(empty_url: str) -> None:
    """Whatever the URL says, all that is written arrives."""
    url = f"{empty_url}{'&' if '?' in empty_url else '?'}client_encoding=LATIN1"
    assert migrate(url) == postgres.migrations()
    with postgres.connect(url, "test") as connection:
        row = connection.execute("SELECT %s::text AS name", ["\u674e\u767d"]).fetchone()
    assert row == {"name": "\u674e\u767d"}


def test_a_half_migrated_database_is_refused(connection: Connection) -> None:
    """Where one migration is missing, it is named."""
    last = postgres.migrations()[-1]
    connection.execute("DELETE FROM _yoyo_migration WHERE migration_id = %s", [last])
    with pytest.raises(NotMigratedError, match=last):
        postgres.check_migrated(connection)


def test_a_newer_database_is_accepted(connection: Connection) -> None:
    """During a rolling deploy the old version goes on with the new schema."""
    connection.execute(
        "INSERT INTO _yoyo_migration (migration_hash, migration_id, applied_at_utc) VALUES ('x', '9999_newer', now())"
    )
    postgres.check_migrated(connection)


@pytest.mark.parametrize(
    ("constraint", "column", "value"),
    [
        ("outbox_status_known", "status", "paused"),
        ("outbox_task_valid", "task", ""),
        ("outbox_task_valid", "task", "x" * 101),
        ("outbox_queue_valid", "queue", "two words"),
        ("outbox_queue_valid", "queue", ""),
        ("outbox_delivery_valid", "delivery", -1),
        ("outbox_attempts_valid", "attempts", -1),
        ("outbox_max_retries_valid", "max_retries", -1),
        ("outbox_max_retries_valid", "max_retries", 1001),
        ("outbox_timeout_valid", "timeout", 0),
        ("outbox_timeout_valid", "timeout", 86_401),
        ("outbox_unique_key_valid", "unique_key", ""),
        ("outbox_unique_key_valid", "unique_key", "x" * 201),
        ("outbox_request_id_valid", "request_id", "x" * 201),
        ("outbox_payload_object", "payload", "[]"),
        ("outbox_running_is_leased", "status", "running"),
        ("outbox_running_is_leased", "lease_until", "2030-01-01"),
        ("outbox_done_is_dated", "status", "done"),
        ("outbox_done_is_dated", "done_at", "2030-01-01"),
    ],
)
def test_the_table_refuses_states_that_cannot_be(
    table: Connection, constraint: str, column: str, value: object
) -> None:
    """Whatever a bug writes, a row is always in a state that the relay and the worker understand."""
    table.execute("INSERT INTO outbox (task, payload) VALUES ('t', '{}')")
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        table.execute(psycopg.sql.SQL("UPDATE outbox SET {} = %s").format(psycopg.sql.Identifier(column)), [value])
    assert caught.value.diag.constraint_name == constraint


def test_every_column_of_the_outbox_is_explained(connection: Connection) -> None:
    """The table explains itself in psql: no column without a comment, and the contract's columns are all there."""
    columns = connection.execute(
        "SELECT attname AS name, col_description(attrelid, attnum) AS comment FROM pg_attribute"
        " WHERE attrelid = 'outbox'::regclass AND attnum > 0 AND NOT attisdropped"
    ).fetchall()
    assert [column["name"] for column in columns if not column["comment"]] == []
    contract = "id task payload queue status run_at delivery attempts max_retries timeout lease_until worker"
    contract += " unique_key last_error created_at enqueued_at started_at done_at"
    assert {column["name"] for column in columns} >= set(contract.split())
