"""Migrations of tables that are in use: they wait for locks without blocking writers."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from outbox.errors import LockedError
from outbox.runtime import migrations, postgres, schema
from outbox.runtime.migrations import migrate
from tests.conftest import Connection
from tests.support.waiting import eventually

CreateDatabase = Callable[[str | None], str]


@pytest.fixture
def old_url(create_database: CreateDatabase, template: str) -> str:
    """A database in which only the first migration is recorded; the others can be applied twice."""
    url = create_database(template)
    with psycopg.connect(url) as connection:
        connection.execute("DELETE FROM _yoyo_migration WHERE migration_id <> %s", [schema.migrations()[0]])
    return url


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Makes migrations wait for a lock, and between two tries, for fractions of a second only."""
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT", 0.2)
    monkeypatch.setattr(migrations, "PAUSE", 0.1)
    return monkeypatch


@contextmanager
def dump(database_url: str) -> Iterator[None]:
    """Holds the lock that pg_dump holds while it runs: that of a reader of the table."""
    with psycopg.connect(database_url) as connection:
        connection.execute("LOCK TABLE outbox IN ACCESS SHARE MODE")
        yield


def is_lock_awaited(connection: Connection) -> bool:
    """Returns whether a session waits for the exclusive lock of the outbox."""
    return bool(
        connection.execute(
            "SELECT FROM pg_locks WHERE relation = 'outbox'::regclass AND mode = 'AccessExclusiveLock' AND NOT granted"
        ).fetchall()
    )


def test_rows_are_written_while_a_migration_waits(old_url: str, impatient: pytest.MonkeyPatch) -> None:
    """Behind a dump, a migration lets later writers go first at each try, and is applied when the dump has ended."""
    impatient.setattr(migrations, "TRIES", 1000)
    with (
        postgres.connect(old_url, "test") as connection,
        capture_logs() as lines,
        ThreadPoolExecutor(1) as threads,
    ):
        with dump(old_url):
            migrated = threads.submit(migrate, old_url)
            for _ in range(3):
                eventually(lambda: is_lock_awaited(connection), 10, "the migration waits for the dump")
                connection.execute("INSERT INTO outbox (task, payload) VALUES ('t', '{}')")
            assert not migrated.done()
        assert migrated.result(20) == schema.migrations()[1:]
    first = next(line for line in lines if line["event"] == "migration waits for a lock")
    assert (first["log_level"], first["migration"], first["next_try"]) == ("warning", schema.migrations()[1], 0.1)


def test_a_migration_gives_up_after_its_tries(old_url: str, impatient: pytest.MonkeyPatch) -> None:
    """A sentence says what to do; nothing of the migration is left, and another run applies it."""
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
    assert schema.migrations()[1] in str(caught.value)
    assert "run 'outbox migrate' again" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [line["event"] for line in lines] == ["migration waits for a lock"]
    assert migrate(old_url) == schema.migrations()[1:]


def test_each_migration_has_tries_of_its_own(old_url: str, impatient: pytest.MonkeyPatch) -> None:
    """A try that an earlier migration used up does not count against a later one."""
    impatient.setattr(migrations, "TRIES", 2)
    apply, refused = migrations._apply, set[str]()

    def apply_at_the_second_try(connection: Connection, name: str) -> bool:
        if name not in {*refused, schema.migrations()[0]}:
            refused.add(name)
            raise psycopg.errors.LockNotAvailable
        return apply(connection, name)

    impatient.setattr(migrations, "_apply", apply_at_the_second_try)
    with capture_logs() as lines:
        assert migrate(old_url) == schema.migrations()[1:]
    waits = [line["migration"] for line in lines if line["event"] == "migration waits for a lock"]
    assert waits == schema.migrations()[1:]


@pytest.fixture
def long_ids_url(create_database: CreateDatabase, template: str) -> str:
    """A database of a version without a limit for request ids, with a row in each status, all with long ids."""
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
    """Otherwise every update of their rows would violate the limit: they could be neither handed over nor completed."""
    assert {"0006_limited_request_ids", "0007_cut_request_ids"} <= set(migrate(long_ids_url))
    with postgres.connect(long_ids_url, "test") as connection:
        connection.execute("UPDATE outbox SET delivery = delivery + 1")
        ids = [row["request_id"] for row in connection.execute("SELECT request_id FROM outbox ORDER BY id")]
        assert ids == ["é" * 200] * 5 + ["short", None]
        valid = "SELECT convalidated FROM pg_constraint WHERE conname = 'outbox_request_id_valid'"
        assert connection.execute(valid).fetchall() == [{"convalidated": True}]


def test_rows_are_written_while_long_request_ids_are_cut(long_ids_url: str, impatient: pytest.MonkeyPatch) -> None:
    """The migration waits for a session that locks such a row, and no session waits for it; long ids are refused."""
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
        assert "0007_cut_request_ids" in migrated.result(20)
