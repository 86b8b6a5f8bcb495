"""Claiming rows: from "Redis says so" to "this worker holds the lease"."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from outbox.queries import query
from outbox.row import Status, named
from outbox.rq_jobs import Delivery
from outbox.runtime import logs
from outbox.runtime.halving import write_by_halves
from outbox.runtime.postgres import Connection

MAX_BYTES = 1_000_000
"""Bytes of payloads, as they are stored, at which a claim takes no further row. Postgres stores them compressed, and as
text they may have many times as many. Payloads of up to 500 bytes are never the limit: 2,000 rows are."""


class Claim(NamedTuple):
    """A row that this worker holds."""

    delivery: Delivery
    task: str
    payload: str
    """JSON, as Postgres has it."""
    queue: str
    attempt: int
    """1 at the first."""
    max_retries: int
    timeout: int
    """Seconds."""
    request_id: str | None
    unhandled_for: float | None = None
    """Seconds since a worker first gave the row back because it could not handle it, if none has handled it since."""


class _Found(NamedTuple):
    """A row of the statement `claim`: what there is under the id of a job."""

    id: int
    delivery: int
    task: str
    payload: Any
    """JSON; None where the row is not claimed."""
    queue: str
    attempt: Any
    """A number; None where the row is not claimed."""
    max_retries: int
    timeout: int
    request_id: str | None
    unhandled_for: float | None
    status: str
    is_claimed: bool
    is_free: bool
    """Whether it could be claimed, though perhaps not in this statement."""


def claim(
    connection: Connection,
    deliveries: Iterable[Delivery],
    worker: str,
    lease: float,
    held: Collection[Delivery] = frozenset(),
    *,
    put_off: list[Delivery] | None = None,
) -> list[Claim]:
    """Claims the rows of these deliveries, as far as they are still to be had.

    It locks first and judges after: a job may arrive here before the relay's transaction has committed, and the
    lock waits for that. What is no row's newest delivery, or is done, running or not yet due, is dropped. To claim the
    same once more is safe: what an earlier try has claimed whose answer was lost is found, and counts once.

    Args:
        connection: in autocommit mode.
        deliveries: what Redis handed out; may repeat, and may be nonsense.
        worker: the name to claim in.
        lease: seconds until the rows are taken away unless renewed.
        held: what this worker holds already. No row of these is begun here, be it a later delivery or, after a restore
            of the table, another row of that id: its earlier attempt may still run. The sweep offers it again.
        put_off: gets the rows that are left for another claim, as the payloads of those before them have MAX_BYTES;
            where there is no such list, all rows are claimed at once.

    Raises:
        psycopg.OperationalError: Postgres is away; what was claimed, another try finds. Or the claim was refused, for
            a row that was locked for over a second, say; then nothing is claimed.
    """
    distinct = set(deliveries)
    held_rows = {delivery.row_id for delivery in held}
    wanted = sorted(delivery for delivery in distinct if delivery.row_id not in held_rows)
    if len(wanted) < len(distinct):
        for delivery in sorted(distinct.difference(wanted)):
            logs.get().warning("dropped job", job=delivery.job_id, why="this worker holds that row already")
    if not wanted:
        return []
    found = (
        connection.cursor(row_factory=named(_Found))
        .execute(
            query("claim"),
            {
                "ids": [delivery.row_id for delivery in wanted],
                "deliveries": [delivery.number for delivery in wanted],
                "worker": worker,
                "lease": lease,
                "bytes": 2**62 if put_off is None else MAX_BYTES,
            },
        )
        .fetchall()
    )
    claims = [
        Claim(
            Delivery(row.id, row.delivery),
            row.task,
            row.payload,
            row.queue,
            row.attempt,
            row.max_retries,
            row.timeout,
            row.request_id,
            row.unhandled_for,
        )
        for row in found
        if row.is_claimed
    ]
    if len(claims) < len(wanted):
        left = set(wanted) - {claimed.delivery for claimed in claims}
        if put_off is not None:
            free = {Delivery(row.id, row.delivery) for row in found if row.is_free}
            put_off += sorted(left & free)
            left -= free
        _log_dropped(found, left)
    return claims


def claim_free(
    connection: Connection,
    deliveries: Sequence[Delivery],
    worker: str,
    lease: float,
    held: Collection[Delivery] = frozenset(),
) -> tuple[list[Claim], list[tuple[Delivery, Exception]]]:
    """Claims those of the rows that nobody else has locked, without waiting, in one transaction.

    Args: as of `claim`.

    Returns:
        The claims, and what Postgres refuses alone as well, and why.

    Raises:
        psycopg.Error: as `write_by_halves` does; none of the rows is claimed, unless the commit got no answer.
    """
    claims: list[Claim] = []

    def claim_some(some: Sequence[Delivery]) -> None:
        with connection.transaction():
            claimed = claim(connection, some, worker, lease, held)
        claims.extend(claimed)

    with connection.transaction():
        found = connection.execute(query("lock_available_rows"), {"ids": [delivery.row_id for delivery in deliveries]})
        free = {row["id"] for row in found}
        refused = write_by_halves([delivery for delivery in deliveries if delivery.row_id in free], claim_some)
    return claims, refused


def _log_dropped(found: Iterable[_Found], dropped: set[Delivery]) -> None:
    by_id = {row.id: row for row in found}
    for delivery in sorted(dropped):
        row = by_id.get(delivery.row_id)
        if row is None:
            why = "there is no such row"
        elif row.delivery != delivery.number:
            why = f"the row's newest delivery is {row.delivery}"
        elif row.status != Status.ENQUEUED:
            why = f"the row is {row.status}"
        else:
            why = "the row is not due yet"
        logs.get().warning("dropped job", job=delivery.job_id, why=why)
