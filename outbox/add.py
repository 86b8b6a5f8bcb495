"""Adding a row to the outbox, in the caller's own transaction."""

from collections.abc import Awaitable, Mapping
from datetime import timedelta
from typing import Any, overload

from psycopg import AsyncConnection, AsyncCursor, Connection, Cursor
from psycopg.types.json import Jsonb

from outbox.queries import query
from outbox.task import P, Task, delay_of


@overload
def add(
    connection: Connection[Any],
    task: Task[P],
    payload: P | Mapping[str, object],
    *,
    delay: float | timedelta | None = None,
    queue: str | None = None,
    max_retries: int | None = None,
    timeout: int | None = None,
    unique_key: str | None = None,
    request_id: str | None = None,
) -> Cursor[Any]: ...


@overload
def add(
    connection: AsyncConnection[Any],
    task: Task[P],
    payload: P | Mapping[str, object],
    *,
    delay: float | timedelta | None = None,
    queue: str | None = None,
    max_retries: int | None = None,
    timeout: int | None = None,
    unique_key: str | None = None,
    request_id: str | None = None,
) -> Awaitable[AsyncCursor[Any]]: ...


def add(
    connection: Connection[Any] | AsyncConnection[Any],
    task: Task[P],
    payload: P | Mapping[str, object],
    *,
    delay: float | timedelta | None = None,
    queue: str | None = None,
    max_retries: int | None = None,
    timeout: int | None = None,
    unique_key: str | None = None,
    request_id: str | None = None,
) -> Cursor[Any] | Awaitable[AsyncCursor[Any]]:
    """Adds a row that commits or rolls back with whatever else `connection` is doing.

    Works on both colours of psycopg connection: it returns what `connection.execute` returns, so await it on an
    asynchronous one. The cursor yields the new row's id, or nothing where `unique_key` is taken.

    Args:
        connection: the caller's open connection, inside the transaction of the change that the row belongs to.
        task: what is to be done.
        payload: the task's model, or a mapping that fits it.
        delay: seconds (or a timedelta) until the first attempt; the task's default unless given.
        queue: another queue than the task's default.
        max_retries: another number of retries than the task's default.
        timeout: another limit per attempt, in seconds, than the task's default.
        unique_key: at most one row that is not done may carry it.
        request_id: goes along in the logs of the row.

    Raises:
        PayloadError: the payload does not fit the task's model; nothing was written.
    """
    return connection.execute(
        query("add_row"),
        {
            "task": task.name,
            "payload": Jsonb(task.dump(payload)),
            "queue": task.queue if queue is None else queue,
            "delay": delay_of(task, delay),
            "max_retries": task.max_retries if max_retries is None else max_retries,
            "timeout": task.timeout if timeout is None else timeout,
            "unique_key": unique_key,
            "request_id": request_id,
        },
    )
