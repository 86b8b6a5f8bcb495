"""Dead letters: the rows that were given up, and what an operator can decide about them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from outbox.postgres import Connection
from outbox.queries import query

Row = dict[str, Any]

BATCH = 500
"""Rows that one transaction locks: workers and other operators wait for no more than these."""

PAYLOAD_LIMIT = 100
"""Characters of a payload that a list shows."""


def count(connection: Connection, task: str | None) -> int:
    """Returns how many rows of `task`, or of all tasks, are dead."""
    found = connection.execute(query("count_dead"), {"task": task}).fetchone()
    assert found is not None
    return int(found["rows"])


def newest(connection: Connection, task: str | None, limit: int) -> list[Row]:
    """Returns the newest dead rows, a line's worth of each.

    `age` is seconds since the last attempt began, or None. `payload` is text: of one that is longer than
    `PAYLOAD_LIMIT`, one character more than that.
    """
    parameters = {"task": task, "limit": limit, "payload_limit": PAYLOAD_LIMIT + 1}
    return connection.execute(query("list_dead"), parameters).fetchall()


def newest_json(connection: Connection, task: str | None, limit: int) -> list[str]:
    """Returns the newest dead rows whole, each as the text of a JSON object with the table's columns."""
    with _in_utc(connection):
        rows = connection.execute(query("list_dead_json"), {"task": task, "limit": limit})
        return [row["document"] for row in rows]


def read(connection: Connection, row: int) -> Row | None:
    """Returns all of one row, dead or not: in texts for people, and as JSON in `document`."""
    with _in_utc(connection):
        return connection.execute(query("show_row"), {"id": row}).fetchone()


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
    found = {row["id"]: row["status"] for row in connection.execute(query("statuses"), {"ids": list(rows)})}
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
