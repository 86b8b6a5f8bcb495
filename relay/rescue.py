"""Taking rows from workers that died."""

import math
import time
from typing import Any

from outbox import logs
from outbox.backoff import retry_delay
from outbox.jobs import Delivery
from outbox.postgres import Connection
from outbox.queries import query

BATCH = 1000
SETTLING_TIME = 0.5
"""Seconds between two looks at a row whose lease has passed. Its worker may live: somebody who had the row locked may
have kept it from renewing and marking, and in that time it tries again."""

_MARGIN = 0.05
"""Seconds by which the second look may come early."""


class Rescue:
    """One relay's rescue, in two steps: a look at whose lease has passed, and a moment later the taking."""

    def __init__(self, settling: float = SETTLING_TIME) -> None:
        """Takes the seconds between the two."""
        self._settling = settling
        self._seen_at: dict[Delivery, float] = {}

    def step(self, connection: Connection, patience: float = math.inf) -> float:
        """Returns rows that were seen before to `pending`, or to `dead`, and returns the seconds until the next step.

        That is infinite where no lease has passed.

        Args:
            connection: in autocommit mode.
            patience: seconds that finding them may take. Where it takes longer, Postgres has stalled, and the workers'
                own writes may be stalled beside this one: nobody is rescued.

        Raises:
            psycopg.OperationalError: Postgres is away.
        """
        now = time.monotonic()
        with connection.transaction():
            expired = connection.execute(query("expired"), {"batch": BATCH}).fetchall()
            if time.monotonic() - now > patience:
                self.forget()
                return self._settling
            self._seen_at = {_delivery(row): self._seen_at.get(_delivery(row), now) for row in expired}
            rows = [row for row in expired if now - self._seen_at[_delivery(row)] >= self._settling]
            if rows:
                _give_back(connection, rows)
        if rows:
            connection.execute(query("notify_relays"))
        for row in rows:
            del self._seen_at[_delivery(row)]
            _tell(row)
        if len(rows) == BATCH:
            return 0  # a busy worker has left more
        return self._settling + _MARGIN if expired else math.inf

    def forget(self) -> None:
        """Forgets what was seen: no lease has passed any more, or nobody may be rescued now."""
        self._seen_at.clear()


def _delivery(row: dict[str, Any]) -> Delivery:
    return Delivery(row["id"], row["delivery"])


def _give_back(connection: Connection, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["status"] = "dead" if row["attempts"] > row["max_retries"] else "pending"
        row["delay"] = _delay(row["attempts"])
    connection.execute(
        query("mark"),
        {
            "ids": [row["id"] for row in rows],
            "deliveries": [row["delivery"] for row in rows],
            "statuses": [row["status"] for row in rows],
            "delays": [row["delay"] for row in rows],
            "attempts": [row["attempts"] for row in rows],
            "errors": [f"the worker {row['worker']} vanished: it did not renew its lease in time" for row in rows],
        },
    )


def _delay(attempts: int) -> float:
    """Returns the seconds until the next attempt: none at first, as the row did no harm that anybody knows of.

    The row may be what kills its workers, and then all that run beside it go down with it: from the second time on it
    waits as after a failure, so that it and the others part company.
    """
    return retry_delay(attempts - 1) if attempts > 1 else 0.0


def _tell(row: dict[str, Any]) -> None:
    logs.get().warning(
        "rescued row",
        type=row["task"],
        queue=row["queue"],
        row=row["id"],
        delivery=row["delivery"],
        attempt=row["attempts"],
        status=row["status"],
        next_try=round(row["delay"], 1) if row["status"] == "pending" else None,
        request_id=row["request_id"],
    )
