"""Reads, retries and discards dead rows in the database."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, LiteralString, NamedTuple

from psycopg.rows import scalar_row

from outbox.queries import query
from outbox.row import Status, named
from outbox.runtime.postgres import Connection

BATCH = 500
"""Rows that one transaction locks, which bounds how long workers and other operators wait."""

PAYLOAD_LIMIT = 100
"""Characters of a payload that a list shows."""


class ListedRow(NamedTuple):
    """A dead row in a list."""

    id: int
    task: str
    attempts: int
    max_retries: int
    age: float | None
    """Seconds since the last attempt began; None if none has begun."""
    last_error: str | None
    payload: str
    """JSON, cut after `PAYLOAD_LIMIT` + 1 characters."""


class ShownRow(NamedTuple):
    """A row with all its columns, as texts for people and as one JSON text for programs."""

    status: Status
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
    """A JSON object with the columns of the table."""


class _RowStatus(NamedTuple):
    """A row of the statement `row_statuses`."""

    id: int
    status: str


def count(connection: Connection, task: str | None) -> int:
    """Returns how many rows of `task`, or of all tasks, are dead."""
    (rows,) = _values(connection, query("count_dead"), task=task)
    return int(rows)


def newest(connection: Connection, task: str | None, limit: int) -> list[ListedRow]:
    """Returns the newest dead rows, with shortened payloads."""
    parameters = {"task": task, "limit": limit, "payload_limit": PAYLOAD_LIMIT + 1}
    return connection.cursor(row_factory=named(ListedRow)).execute(query("list_dead"), parameters).fetchall()


def newest_json(connection: Connection, task: str | None, limit: int) -> list[str]:
    """Returns the newest dead rows, each as the text of a JSON object with the columns of the table."""
    with _in_utc(connection):
        return _values(connection, query("list_dead_json"), task=task, limit=limit)


def read(connection: Connection, row_id: int) -> ShownRow | None:
    """Returns one row, dead or not; None if it does not exist."""
    with _in_utc(connection):
        row = connection.cursor(row_factory=named(ShownRow)).execute(query("show_row"), {"id": row_id}).fetchone()
    return row._replace(status=Status(row.status)) if row else None


def ids(connection: Connection, task: str | None) -> list[int]:
    """Returns the ids of all dead rows of `task`, or of all tasks, in order."""
    (row_ids,) = _values(connection, query("dead_ids"), task=task)
    return list(row_ids)


def retry(connection: Connection, row_ids: Sequence[int]) -> list[int]:
    """Makes dead rows pending with all their attempts, due as `retry_dead` in `sql/queries.sql` says; wakes the relays.

    Args:
        connection: in autocommit mode; each batch of rows is one transaction.
        row_ids: rows that are not dead are not changed.

    Returns:
        The ids of the rows that were dead, sorted.
    """
    retried: list[int] = []
    for batch in _batches(row_ids):
        retried_batch = _values(connection, query("retry_dead"), ids=batch)
        if retried_batch:
            connection.execute(query("notify_relays"))
        retried += retried_batch
    return sorted(retried)


def unhandled_ids(connection: Connection, task: str | None) -> list[int]:
    """Returns the ids of rows of `task`, or of all tasks, that workers give back because they cannot handle them."""
    (row_ids,) = _values(connection, query("unhandled_ids"), task=task)
    return list(row_ids)


def give_up(connection: Connection, row_ids: Sequence[int]) -> list[int]:
    """Makes rows of `unhandled_ids` dead, in batches as `retry` does, and returns the ids of those that now are."""
    return sorted(
        row_id for batch in _batches(row_ids) for row_id in _values(connection, query("give_up_unhandled"), ids=batch)
    )


def discard(connection: Connection, row_ids: Sequence[int]) -> list[int]:
    """Deletes dead rows, in batches as `retry` does, and returns their ids."""
    return sorted(
        row_id for batch in _batches(row_ids) for row_id in _values(connection, query("discard_dead"), ids=batch)
    )


def statuses(connection: Connection, row_ids: Sequence[int]) -> dict[int, Status | None]:
    """Returns the status of each row; None for a row that does not exist."""
    rows = connection.cursor(row_factory=named(_RowStatus)).execute(query("row_statuses"), {"ids": list(row_ids)})
    existing = {row.id: Status(row.status) for row in rows}
    return {row_id: existing.get(row_id) for row_id in row_ids}


def _values(connection: Connection, statement: LiteralString, **parameters: object) -> list[Any]:
    """Returns the values of a statement's only column."""
    return connection.cursor(row_factory=scalar_row).execute(statement, parameters).fetchall()


@contextmanager
def _in_utc(connection: Connection) -> Iterator[None]:
    """Runs a block in a transaction with times in UTC; a setting of the session would be unsafe behind a pooler."""
    with connection.transaction():
        connection.execute(query("show_utc"))
        yield


def _batches(row_ids: Sequence[int]) -> Iterator[list[int]]:
    ordered = sorted(row_ids)
    for start in range(0, len(ordered), BATCH):
        yield ordered[start : start + BATCH]
