"""`outbox migrate`: once per migration, one process at a time, and recorded."""

import getpass
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import NoReturn

import psycopg
import pytest
from structlog.testing import capture_logs

from outbox.errors import NotMigratedError, UnsupportedDatabaseError
from outbox.queries import query, sql_folder
from outbox.runtime import postgres, schema
from outbox.runtime.migrations import migrate
from tests.conftest import Connection
from tests.support.waiting import eventually


def test_concurrent_migrations_are_safe(empty_url: str) -> None:
    """Exactly one of four applies each migration, and none fails."""
    barrier = Barrier(4)

    def run() -> list[str]:
        barrier.wait(10)
        return migrate(empty_url)

    with ThreadPoolExecutor(4) as threads:
        applied = [name for future in [threads.submit(run) for _ in range(4)] for name in future.result(30)]
    assert sorted(applied) == schema.migrations()


def test_concurrent_commands_are_safe(empty_url: str) -> None:
    """`outbox migrate` runs twice at the same time: both succeed, and the schema exists."""
    environment = {**os.environ, "DATABASE_URL": empty_url}
    command = [sys.executable, "-m", "outbox", "migrate"]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=30)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert all("db migrated" in output for output in outputs)
    with postgres.connect(empty_url, "test") as connection:
        schema.check_migrated(connection)


def test_a_second_run_does_nothing(database_url: str, connection: Connection) -> None:
    """Applied migrations and their records stay unchanged."""
    before = connection.execute("SELECT * FROM _yoyo_migration").fetchall()
    assert migrate(database_url) == []
    assert connection.execute("SELECT * FROM _yoyo_migration").fetchall() == before


def test_a_kill_before_the_record_leaves_nothing(empty_url: str) -> None:
    """A migration that is killed after creating its tables is rolled back; the next run applies it."""
    with (
        postgres.connect(empty_url, "test") as connection,
        psycopg.connect(empty_url) as holder,
    ):
        connection.execute((sql_folder() / "records.sql").read_bytes())
        holder.execute(query("record_migration"), {"migration": schema.migrations()[0]})
        environment = {**os.environ, "DATABASE_URL": empty_url}
        running = subprocess.Popen(
            [sys.executable, "-m", "outbox", "migrate"], env=environment, stdout=subprocess.DEVNULL
        )
        eventually(lambda: waits_to_record(connection), 20, "it is about to record a migration")
        running.kill()
        running.wait()
        holder.rollback()
        assert migrate(empty_url) == schema.migrations()
        schema.check_migrated(connection)


def waits_to_record(connection: Connection) -> bool:
    """Returns whether a session waits for another one that wrote the same record and has not committed it."""
    return bool(connection.execute("SELECT FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted").fetchall())


@pytest.mark.parametrize("applied", [1, 4])
def test_an_unrecorded_migration_is_recorded(empty_url: str, applied: int) -> None:
    """An earlier version was interrupted before the record, or a restore left out the records."""
    with postgres.connect(empty_url, "test") as connection, capture_logs() as lines:
        connection.execute((sql_folder() / "records.sql").read_bytes())
        connection.execute("CREATE TABLE yoyo_lock (locked integer PRIMARY KEY, ctime timestamp, pid integer)")
        connection.execute("INSERT INTO yoyo_lock VALUES (1, now(), 999999)")
        for name in schema.migrations()[:applied]:
            connection.execute((sql_folder() / "migrations" / f"{name}.sql").read_bytes())
        connection.execute("INSERT INTO outbox (task, payload) VALUES ('t', '{}')")

        assert migrate(empty_url) == schema.migrations()
        schema.check_migrated(connection)
        assert connection.execute("SELECT task FROM outbox").fetchall() == [{"task": "t"}]
    (line,) = [line for line in lines if line["log_level"] != "info"]
    assert (line["event"], line["migration"]) == ("migration was not recorded", schema.migrations()[0])


def test_foreign_tables_are_not_mistaken_for_ours(empty_url: str) -> None:
    """An application's own table `users` is an error, not an unrecorded migration, and nothing is created."""
    with postgres.connect(empty_url, "test") as connection:
        connection.execute("CREATE TABLE users (id integer)")
        with pytest.raises(psycopg.errors.DuplicateTable, match="users"):
            migrate(empty_url)
        assert connection.execute("SELECT to_regclass('outbox') AS oid").fetchone() == {"oid": None}
        assert connection.execute("SELECT FROM _yoyo_migration").fetchall() == []


def test_no_name_of_host_or_user_is_looked_up(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS may be slow, and a container's uid may have no name."""

    def unknown(*_: object) -> NoReturn:
        raise OSError("no name")

    for name in ("getfqdn", "gethostbyaddr", "gethostname"):
        monkeypatch.setattr(socket, name, unknown)
    monkeypatch.setattr(getpass, "getuser", unknown)
    assert migrate(empty_url) == schema.migrations()


def test_an_unmigrated_database_is_refused(empty_url: str) -> None:
    """The sentence names the command to run."""
    with postgres.connect(empty_url, "test") as connection:
        with pytest.raises(NotMigratedError, match="run 'outbox migrate'"):
            schema.check_migrated(connection)
        migrate(empty_url)
        schema.check_migrated(connection)


def test_a_half_migrated_database_is_refused(connection: Connection) -> None:
    """The error names the missing migration."""
    last = schema.migrations()[-1]
    connection.execute("DELETE FROM _yoyo_migration WHERE migration_id = %s", [last])
    with pytest.raises(NotMigratedError, match=last):
        schema.check_migrated(connection)


def test_a_newer_database_is_accepted(connection: Connection) -> None:
    """During a rolling deploy, the old version keeps running with the new schema."""
    connection.execute(
        "INSERT INTO _yoyo_migration (migration_hash, migration_id, applied_at_utc) VALUES ('x', '9999_newer', now())"
    )
    schema.check_migrated(connection)


def test_a_database_that_is_not_in_utf8_is_refused(foreign_url: str) -> None:
    """It cannot hold every name: nothing is created in it, and the sentence says how to create another."""
    with pytest.raises(UnsupportedDatabaseError, match="ENCODING 'UTF8'"):
        migrate(foreign_url)
    with postgres.connect(foreign_url, "test") as connection:
        assert connection.execute("SELECT FROM pg_class WHERE relname ~ '^(_?yoyo|outbox|users)'").fetchall() == []
        with pytest.raises(UnsupportedDatabaseError, match=connection.info.dbname):
            schema.check_migrated(connection)


def test_every_connection_speaks_utf8(empty_url: str) -> None:
    """A client encoding in the URL has no effect."""
    url = f"{empty_url}{'&' if '?' in empty_url else '?'}client_encoding=LATIN1"
    assert migrate(url) == schema.migrations()
    with postgres.connect(url, "test") as connection:
        row = connection.execute("SELECT %s::text AS name", ["\u674e\u767d"]).fetchone()
    assert row == {"name": "\u674e\u767d"}
