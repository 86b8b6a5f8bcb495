"""Adds a row to the outbox in the caller's transaction."""

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
    """Options of one row. Those that a task has too override the task's default."""

    delay: float | timedelta
    """Seconds until the first attempt, or a timedelta."""
    queue: str
    """1 to 50 letters, digits, '_' or '-'; a queue that `OUTBOX_QUEUES` names."""
    max_retries: int
    """Upper bound of attempts after the first."""
    timeout: int
    """Time limit of one attempt in seconds."""
    unique_key: str | None
    """1 to 200 characters. At most one row that is not done has it; a dead row is not done."""
    request_id: str | None
    """At most 200 characters. Log lines about the row carry it."""


_MAX_LENGTH = 200
"""Characters of a `unique_key` or a `request_id`, as in the table's constraints."""


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
    """Adds a row in the transaction of `connection`: the row commits or rolls back with it.

    On an asynchronous connection it returns a coroutine: nothing is added until it is awaited. Type checkers report a
    coroutine that is not awaited, and Python warns about it.

    Args:
        connection: the caller's open connection, inside the transaction of the change that the row belongs to.
        task: the task.
        payload: an instance of the task's model, or a mapping that fits it.
        options: see `Options`.

    Returns:
        The row's id; None if its `unique_key` is taken, and then nothing was written.

    Raises:
        PayloadError: the payload does not fit the task's model; nothing was written.
        TypeError: there is no option of that name; nothing was written.
        OptionError: `unique_key` or `request_id` is too long; nothing was written.
        psycopg.errors.CheckViolation: another option is out of its limits.

    Example:
        def sign_up(connection: psycopg.Connection, username: str) -> None:
            with connection.transaction():
                connection.execute("INSERT INTO members (username) VALUES (%s)", [username])
                add(connection, GREET, {"username": username}, delay=60)
    """
    parameters = _parameters(task, payload, options)
    if isinstance(connection, AsyncConnection):
        return _add_async(connection, parameters)
    return connection.cursor(row_factory=scalar_row).execute(query("add_row"), parameters).fetchone()


async def _add_async(connection: AsyncConnection[Any], parameters: Mapping[str, object]) -> int | None:
    cursor = connection.cursor(row_factory=scalar_row)
    await cursor.execute(query("add_row"), parameters)
    return await cursor.fetchone()


def _parameters(task: Task[P], payload: P | Mapping[str, object], options: Options) -> dict[str, object]:
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(f"outbox.add has no option {', '.join(sorted(unknown))}")
    unique_key, request_id = options.get("unique_key"), options.get("request_id")
    for name, text in (("unique_key", unique_key), ("request_id", request_id)):
        if text is not None and (length := len(str(text))) > _MAX_LENGTH:
            raise OptionError(f"{name} has {length} characters: outbox.add takes at most {_MAX_LENGTH}")
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
