"""Adding a row to the outbox, in the caller's own transaction."""

from collections.abc import Coroutine, Mapping
from datetime import timedelta
from typing import Any, TypedDict, Unpack, overload

from psycopg import AsyncConnection, Connection
from psycopg.rows import scalar_row
from psycopg.types.json import Jsonb

from outbox.errors import OptionError
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
    """At most 200 characters. Goes along in the logs of the row."""


_MOST_CHARACTERS = 200
"""Of a `unique_key` or a `request_id`; the table has the same limits."""


@overload
def add(
    connection: Connection[Any], task: Task[P], payload: P | Mapping[str, object], **options: Unpack[Options]
) -> int | None: ...


@overload
def add(
    connection: AsyncConnection[Any], task: Task[P], payload: P | Mapping[str, object], **options: Unpack[Options]
) -> Coroutine[Any, Any, int | None]: ...


def add(
    connection: Connection[Any] | AsyncConnection[Any],
    task: Task[P],
    payload: P | Mapping[str, object],
    **options: Unpack[Options],
) -> int | Coroutine[Any, Any, int | None] | None:
    """Adds a row that commits or rolls back with whatever else `connection` is doing.

    Works on both colours of psycopg connection. On an asynchronous one it returns a coroutine: await it, or nothing is
    added. Type checkers report a coroutine that is not awaited, and so does Python when it is run.

    Args:
        connection: the caller's open connection, inside the transaction of the change that the row belongs to.
        task: what is to be done.
        payload: the task's model, or a mapping that fits it.
        options: see `Options`.

    Returns:
        The row's id, or None where its `unique_key` is taken; nothing was written then.

    Raises:
        PayloadError: the payload does not fit the task's model; nothing was written.
        TypeError: there is no option of that name; nothing was written.
        OptionError: `unique_key` or `request_id` is too long; nothing was written.
        psycopg.errors.CheckViolation: another option is out of its limits.
    """
    row = _row(task, payload, options)
    if isinstance(connection, AsyncConnection):
        return _add_async(connection, row)
    return connection.cursor(row_factory=scalar_row).execute(query("add_row"), row).fetchone()


async def _add_async(connection: AsyncConnection[Any], row: Mapping[str, object]) -> int | None:
    cursor = connection.cursor(row_factory=scalar_row)
    await cursor.execute(query("add_row"), row)
    return await cursor.fetchone()


def _row(task: Task[P], payload: P | Mapping[str, object], options: Options) -> dict[str, object]:
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(f"outbox.add has no option {', '.join(sorted(unknown))}")
    unique_key, request_id = options.get("unique_key"), options.get("request_id")
    for name, text in (("unique_key", unique_key), ("request_id", request_id)):
        if text is not None and (length := len(str(text))) > _MOST_CHARACTERS:
            raise OptionError(f"{name} has {length} characters: outbox.add takes {_MOST_CHARACTERS} at most")
    delay = options.get("delay", task.delay)
    return {
        "task": task.name,
        "payload": Jsonb(task.dump(payload)),
        "queue": options.get("queue", task.queue),
        "delay": delay.total_seconds() if isinstance(delay, timedelta) else delay,
        "max_retries": options.get("max_retries", task.max_retries),
        "timeout": options.get("timeout", task.timeout),
        "unique_key": unique_key,
        "request_id": request_id,
    }
