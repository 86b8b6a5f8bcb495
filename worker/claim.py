"""Claiming rows: from "Redis says so" to "this worker holds the lease"."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from outbox import logs
from outbox.jobs import Delivery
from outbox.queries import query


@dataclass(frozen=True)
class Claim:
    """A row that this worker holds."""

    delivery: Delivery
    task: str
    payload: dict[str, Any]
    queue: str
    attempt: int
    """1 at the first."""
    max_retries: int
    timeout: int
    """Seconds."""
    request_id: str | None


def claim(
    connection: psycopg.Connection[dict[str, Any]], deliveries: Sequence[Delivery], worker: str, lease: float
) -> list[Claim]:
    """Claims the rows of these deliveries, as far as they are still to be had.

    It locks first and judges after: a job may arrive here before the relay's transaction has committed, and the
    lock waits for that. What is no row's newest delivery, or is done, running or not yet due, is dropped.

    Args:
        connection: in autocommit mode.
        deliveries: what Redis handed out; may repeat, and may be nonsense.
        worker: the name to claim in.
        lease: seconds until the rows are taken away unless renewed.

    Raises:
        psycopg.OperationalError: Postgres is away; nothing is claimed.
    """
    wanted = {delivery.row: delivery for delivery in sorted(deliveries)}
    with connection.transaction():
        rows = connection.execute(query("lock_jobs"), {"ids": list(wanted)}).fetchall()
        claims = [
            Claim(
                delivery=wanted[row["id"]],
                task=row["task"],
                payload=row["payload"],
                queue=row["queue"],
                attempt=row["attempts"] + 1,
                max_retries=row["max_retries"],
                timeout=row["timeout"],
                request_id=row["request_id"],
            )
            for row in rows
            if row["status"] == "enqueued" and row["delivery"] == wanted[row["id"]].number and row["due"]
        ]
        if claims:
            ids = [claimed.delivery.row for claimed in claims]
            connection.execute(query("claim"), {"ids": ids, "worker": worker, "lease": lease})
    if len(claims) < len(wanted):
        _tell_of_dropped(rows, wanted, {claimed.delivery.row for claimed in claims})
    return claims


def _tell_of_dropped(rows: list[dict[str, Any]], wanted: dict[int, Delivery], claimed: set[int]) -> None:
    found = {row["id"]: row for row in rows}
    for row_id, delivery in wanted.items():
        if row_id in claimed:
            continue
        row = found.get(row_id)
        if row is None:
            why = "there is no such row"
        elif row["delivery"] != delivery.number:
            why = f"the row's newest delivery is {row['delivery']}"
        elif row["status"] != "enqueued":
            why = f"the row is {row['status']}"
        else:
            why = "the row is not due yet"
        logs.get().warning("dropped job", job=delivery.job_id, why=why)
