"""Dead letters: the rows that were given up, and what an operator can decide about them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from outbox.queries import query
from outbox.row import named
from outbox.runtime.postgres import Connection

BATCH = 500
"""Rows that one transaction locks: workers and other operators wait for no more than these."""

PAYLOAD_LIMIT = 100
"""Characters of a payload that a list shows."""


class ListedRow(NamedTuple):
    """A dead row as a list shows it."""

    id: int
    task: str
    attempts: int
    max_retries: int
    age: float | None
    """Seconds since the last attempt began, if one has."""
    last_error: str | None
    payload: str
    """JSON; of one that is longer than `PAYLOAD_LIMIT`, one character more than that."""


class ShownRow(NamedTuple):
    """All of one row, in texts for people and in one for programs."""

    status: str
    task: str
    queue: str
    attempts: int
    max_retries: int
    last_error: str | None
    worker: str | None
    unique_key: str | None
    request_id: str | None
    created_at: str
    started_at: str | None
    payload: str
    """JSON, indented."""
    document: str
    """JSON: an object with the table's columns."""


def count(connection: Connection, task: str | None) -> int:
    """Returns how many rows of `task`, or of all tasks, are dead."""
    found = connection.execute(query("count_dead"), {"task": task}).fetchone()
    assert found is not None
    return int(found["rows"])


def newest(connection: Connection, task: str | None, limit: int) -> list[ListedRow]:
    """Returns the newest dead rows, a line's worth of each."""
    parameters = {"task": task, "limit": limit, "payload_limit": PAYLOAD_LIMIT + 1}
    return connection.cursor(row_factory=named(ListedRow)).execute(query("list_dead"), parameters).fetchall()


def newest_json(connection: Connection, task: str | None, limit: int) -> list[str]:
    """Returns the newest dead rows whole, each as the text of a JSON object with the table's columns."""
    with _in_utc(connection):
        rows = connection.execute(query("list_dead_json"), {"task": task, "limit": limit})
        return [row["document"] for row in rows]


def read(connection: Connection, row_id: int) -> ShownRow | None:
    """Returns all of one row, dead or not; None where there is none."""
    with _in_utc(connection):
        return connection.cursor(row_factory=named(ShownRow)).execute(query("show_row"), {"id": row_id}).fetchone()


def ids(connection: Connection, task: str | None) -> list[int]:
    """Returns the ids of all dead rows of `task`, or of all tasks, in order."""
    found = connection.execute(query("dead_ids"), {"task": task}).fetchone()
    assert found is not None
    return list(found["ids"])


def retry(connection: Connection, rows: Sequence[int]) -> list[int]:
    """Makes dead rows pending, with a fresh count and due at once, and wakes the relays.

    Args:
        connection: in autocommit mode; each batch of rows is a transaction of its own.
        rows: ids; those of rows that are not dead are left alone.

    Returns:
        The ids of the rows that were dead, in order.
    """
    retried: list[int] = []
    for batch in _batches(rows):
        found = [row["id"] for row in connection.execute(query("retry_dead"), {"ids": batch})]
        if found:
            connection.execute(query("notify_relays"))
        retried += found
    return sorted(retried)


def unhandled_ids(connection: Connection, task: str | None) -> list[int]:
    """Returns the ids of rows of `task`, or of all tasks, that workers give back because they cannot handle them."""
    found = connection.execute(query("unhandled_ids"), {"task": task}).fetchone()
    assert found is not None
    return list(found["ids"])


def give_up(connection: Connection, rows: Sequence[int]) -> list[int]:
    """Makes such rows dead, as `retry` retries dead ones, and returns their ids."""
    return sorted(
        row["id"]
        for batch in _batches(rows)
        for row in connection.execute(query("give_up_unhandled"), {"ids": batch}).fetchall()
    )


def discard(connection: Connection, rows: Sequence[int]) -> list[int]:
    """Deletes dead rows, as `retry` retries them, and returns their ids."""
    return sorted(
        row["id"]
        for batch in _batches(rows)
        for row in connection.execute(query("discard_dead"), {"ids": batch}).fetchall()
    )


def statuses(connection: Connection, rows: Sequence[int]) -> dict[int, str | None]:
    """Returns what each of these rows is; None for one that does not exist."""
    found = {row["id"]: row["status"] for row in connection.execute(query("row_statuses"), {"ids": list(rows)})}
    return {row: found.get(row) for row in rows}


@contextmanager
def _in_utc(connection: Connection) -> Iterator[None]:
    """Runs a block in a transaction that shows times in UTC, also behind a pooler, where no session is ours."""
    with connection.transaction():
        connection.execute(query("show_utc"))
        yield


def _batches(rows: Sequence[int]) -> Iterator[list[int]]:
    ordered = sorted(rows)
    for start in range(0, len(ordered), BATCH):
        yield ordered[start : start + BATCH]
