"""The table `outbox`: its constraints and comments."""

from collections.abc import Callable, Iterator

import psycopg
import psycopg.sql
import pytest

from outbox.runtime import postgres
from tests.conftest import Connection

CreateDatabase = Callable[[str | None], str]


@pytest.fixture(scope="module")
def table(create_database: CreateDatabase, template: str) -> Iterator[Connection]:
    """A connection to a migrated database for all tests of this module."""
    with postgres.connect(create_database(template), "test") as opened:
        yield opened


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
def test_the_table_refuses_impossible_states(table: Connection, constraint: str, column: str, value: object) -> None:
    """Even a bug cannot bring a row into a state that relay and worker do not understand."""
    table.execute("INSERT INTO outbox (task, payload) VALUES ('t', '{}')")
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        table.execute(psycopg.sql.SQL("UPDATE outbox SET {} = %s").format(psycopg.sql.Identifier(column)), [value])
    assert caught.value.diag.constraint_name == constraint


def test_every_column_of_the_outbox_has_a_comment(connection: Connection) -> None:
    """It is what psql shows, and all columns of the contract exist."""
    columns = connection.execute(
        "SELECT attname AS name, col_description(attrelid, attnum) AS comment FROM pg_attribute"
        " WHERE attrelid = 'outbox'::regclass AND attnum > 0 AND NOT attisdropped"
    ).fetchall()
    assert [column["name"] for column in columns if not column["comment"]] == []
    contract = "id task payload queue status run_at delivery attempts max_retries timeout lease_until worker"
    contract += " unique_key last_error created_at enqueued_at started_at done_at"
    assert {column["name"] for column in columns} >= set(contract.split())
