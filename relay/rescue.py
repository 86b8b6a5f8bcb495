"""Taking rows from workers that died."""

import math
import time
from typing import Any

from outbox import logs
from outbox.backoff import retry_delay
from outbox.postgres import Connection
from outbox.queries import query

BATCH = 500


def rescue(connection: Connection, patience: float = math.inf) -> int:
    """Returns `running` rows whose lease has passed to `pending`, or to `dead`, and returns how many there were.

    Args:
        connection: in autocommit mode.
        patience: seconds that finding them may take. Where it takes longer, Postgres has stalled, and the workers' own
            writes may be stalled beside this one: nobody is rescued.

    Raises:
        psycopg.OperationalError: Postgres is away.
    """
    begun = time.monotonic()
    with connection.transaction():
        rows = connection.execute(query("expired"), {"batch": BATCH}).fetchall()
        if not rows or time.monotonic() - begun > patience:
            return 0
        statuses = ["dead" if row["attempts"] > row["max_retries"] else "pending" for row in rows]
        delays = [_delay(row["attempts"]) for row in rows]
        connection.execute(
            query("mark"),
            {
                "ids": [row["id"] for row in rows],
                "deliveries": [row["delivery"] for row in rows],
                "statuses": statuses,
                "delays": delays,
                "attempts": [row["attempts"] for row in rows],
                "errors": [f"the worker {row['worker']} vanished: it did not renew its lease in time" for row in rows],
            },
        )
    connection.execute(query("notify_relays"))
    for row, status, delay in zip(rows, statuses, delays, strict=True):
        _tell(row, status, delay)
    return len(rows)


def _delay(attempts: int) -> float:
    """Returns the seconds until the next attempt: none at first, as the row did no harm that anybody knows of.

    The row may be what kills its workers, and then all that run beside it go down with it: from the second time on it
    waits as after a failure, so that it and the others part company.
    """
    return retry_delay(attempts - 1) if attempts > 1 else 0.0


def _tell(row: dict[str, Any], status: str, delay: float) -> None:
    logs.get().warning(
        "rescued row",
        type=row["task"],
        queue=row["queue"],
        row=row["id"],
        delivery=row["delivery"],
        attempt=row["attempts"],
        status=status,
        next_try=round(delay, 1) if status == "pending" else None,
        request_id=row["request_id"],
    )
