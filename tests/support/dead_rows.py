"""`outbox dead` run inside a test, and dead rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.conftest import Connection

MAX_ID = 2**63 - 1


class Result(NamedTuple):
    """The exit code and output of a command."""

    code: int
    out: str
    err: str


RunDead = Callable[..., Result]


def add_dead_row(connection: Connection, **columns: Any) -> int:
    """Adds a row and returns its id; by default it is dead after 4 attempts and 3 deliveries."""
    row = connection.execute(
        "INSERT INTO outbox (task, payload, status, delivery, attempts, max_retries, run_at, worker, last_error,"
        " started_at, lease_until, done_at) VALUES (%(task)s, %(payload)s, %(status)s, 3, 4, 3,"
        " now() - interval '1 day', 'w1', %(last_error)s, now() - interval '3 h 5 min',"
        " CASE WHEN %(status)s = 'running' THEN now() END, CASE WHEN %(status)s = 'done' THEN now() END) RETURNING id",
        {"task": "send", "payload": '{"n": 1}', "status": "dead", "last_error": "no", **columns},
    ).fetchone()
    assert row is not None
    return int(row["id"])


def rows_by_id(connection: Connection) -> dict[int, dict[str, Any]]:
    """Returns every row by its id, with `due_now`."""
    rows = connection.execute("SELECT *, run_at BETWEEN now() - interval '1 min' AND now() AS due_now FROM outbox")
    return {row["id"]: row for row in rows}


def status_of(connection: Connection, row_id: int) -> str | None:
    """Returns the status of a row, or None if it does not exist."""
    row = connection.execute("SELECT status FROM outbox WHERE id = %s", [row_id]).fetchone()
    return row["status"] if row else None
