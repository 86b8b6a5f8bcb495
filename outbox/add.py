"""Adding a row to the outbox, in the caller's own transaction."""

from collections.abc import Awaitable, Mapping
from datetime import timedelta
from typing import Any, TypedDict, Unpack, overload

from psycopg import AsyncConnection, AsyncCursor, Connection, Cursor
from psycopg.types.json import Jsonb

from outbox.queries import query
from outbox.task import P, Task


class Options(TypedDict, total=False):
    """What may be said of one row, where the task's default does not do."""

    delay: float | timedelta
    """Until the first attempt: seconds, or a timedelta."""
    queue: str
    """1 to 50 letters, digits, '_' or '-'; one that `OUTBOX_QUEUES` of the relays names."""
    max_retries: int
    """How many attempts may follow the first."""
    timeout: int
    """Seconds that one attempt may take."""
    unique_key: str | None
    """1 to 200 characters. At most one row that is not done may carry it, and a dead row is not done."""
    request_id: str | None
    """Goes along in the logs of the row."""


@overload
def add(
    connection: Connection[Any], task: Task[P], payload: P | Mapping[str, object], **options: Unpack[Options]
) -> Cursor[Any]: ...


@overload
def add(
    connection: AsyncConnection[Any], task: Task[P], payload: P | Mapping[str, object], **options: Unpack[Options]
) -> Awaitable[AsyncCursor[Any]]: ...


def add(
    connection: Connection[Any] | AsyncConnection[Any],
    task: Task[P],
    payload: P | Mapping[str, object],
    **options: Unpack[Options],
) -> Cursor[Any] | Awaitable[AsyncCursor[Any]]:
    """Adds a row that commits or rolls back with whatever else `connection` is doing.

    Works on both colours of psycopg connection: it returns what `connection.execute` returns, so await it on an
    asynchronous one. The cursor yields the new row's id, or nothing where `unique_key` is taken.

    Args:
        connection: the caller's open connection, inside the transaction of the change that the row belongs to.
        task: what is to be done.
        payload: the task's model, or a mapping that fits it.
        options: see `Options`.

    Raises:
        PayloadError: the payload does not fit the task's model; nothing was written.
        TypeError: there is no option of that name; nothing was written.
        psycopg.errors.CheckViolation: an option is out of its limits.
    """
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(f"outbox.add has no option {', '.join(sorted(unknown))}")
    delay = options.get("delay", task.delay)
    return connection.execute(
        query("add_row"),
        {
            "task": task.name,
            "payload": Jsonb(task.dump(payload)),
            "queue": options.get("queue", task.queue),
            "delay": delay.total_seconds() if isinstance(delay, timedelta) else delay,
            "max_retries": options.get("max_retries", task.max_retries),
            "timeout": options.get("timeout", task.timeout),
            "unique_key": options.get("unique_key"),
            "request_id": options.get("request_id"),
        },
    )
