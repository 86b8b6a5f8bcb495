"""Claims the rows of jobs: locks them in Postgres and makes this worker their holder."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from psycopg.rows import scalar_row

from outbox.queries import query
from outbox.row import Status, named
from outbox.rq_jobs import Delivery, columns
from outbox.runtime import logs
from outbox.runtime.batches import write_bisecting
from outbox.runtime.postgres import Connection

MAX_BYTES = 1_000_000
"""Bytes of stored payloads at which a claim takes no further row. Postgres stores payloads compressed; as text they may
be many times as long. Payloads of up to 500 bytes never reach this limit: at most 2,000 rows are claimed ahead."""


class Claim(NamedTuple):
    """A row that this worker holds."""

    delivery: Delivery
    task: str
    payload: str
    """JSON text from Postgres."""
    queue: str
    attempt: int
    """The number of this attempt, from 1."""
    max_retries: int
    timeout: int
    """Seconds."""
    request_id: str | None
    unhandled_for: float | None = None
    """Seconds since a worker first gave the row back because it could not handle it; None if a worker could."""


class _JobRow(NamedTuple):
    """The outbox row with the id that a job names, as the statement `claim` returns it."""

    id: int
    delivery: int
    task: str
    payload: Any
    """JSON text; None if the row is not claimed."""
    queue: str
    attempt: Any
    """A number; None if the row is not claimed."""
    max_retries: int
    timeout: int
    request_id: str | None
    unhandled_for: float | None
    status: str
    is_claimed: bool
    is_free: bool
    """Whether it can be claimed, by this statement or a later one."""


def claim(
    connection: Connection,
    deliveries: Iterable[Delivery],
    worker: str,
    lease: float,
    held: Collection[Delivery] = frozenset(),
    *,
    put_off: list[Delivery] | None = None,
) -> list[Claim]:
    """Claims the rows of these deliveries that can be claimed, and drops the other jobs.

    The statement locks first and judges after: a job may arrive before the relay's transaction has committed, and the
    lock waits for that commit. A job is dropped if it does not name the newest delivery of its row, or if the row is
    not enqueued or not yet due. A repeated claim is safe: it returns the rows that an earlier claim without an answer
    has claimed, and counts their attempt once.

    Args:
        connection: in autocommit mode.
        deliveries: from job ids in Redis; they may repeat, and may name no row.
        worker: the name to claim in.
        lease: seconds until the leases pass, unless they are renewed.
        held: the deliveries that this worker holds. Rows with the same ids are not claimed, also if the job names a
            later delivery or, after a restore of the table, another row: the earlier attempt may still run. The sweep
            takes such rows back.
        put_off: receives the deliveries that are left for another claim because the payloads before them have
            MAX_BYTES; without this list, all rows are claimed at once.

    Raises:
        psycopg.OperationalError: Postgres is away, and rows may be claimed, which a repeated claim returns. Or Postgres
            refused the claim, because a row was locked for over a second for example, and no row is claimed.
    """
    distinct = set(deliveries)
    held_row_ids = {delivery.row_id for delivery in held}
    candidates = sorted(delivery for delivery in distinct if delivery.row_id not in held_row_ids)
    if len(candidates) < len(distinct):
        for delivery in sorted(distinct.difference(candidates)):
            logs.get().warning("dropped job", job=delivery.job_id, why="this worker holds that row already")
    if not candidates:
        return []
    rows = (
        connection.cursor(row_factory=named(_JobRow))
        .execute(
            query("claim"),
            {
                **columns(candidates),
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
        for row in rows
        if row.is_claimed
    ]
    if len(claims) < len(candidates):
        unclaimed = set(candidates) - {claimed.delivery for claimed in claims}
        if put_off is not None:
            free = {Delivery(row.id, row.delivery) for row in rows if row.is_free}
            put_off += sorted(unclaimed & free)
            unclaimed -= free
        _log_dropped(rows, unclaimed)
    return claims


def claim_free(
    connection: Connection,
    deliveries: Sequence[Delivery],
    worker: str,
    lease: float,
    held: Collection[Delivery] = frozenset(),
) -> tuple[list[Claim], list[tuple[Delivery, Exception]]]:
    """Claims the rows that no other session has locked, without waiting, in one transaction.

    Args: as of `claim`.

    Returns:
        The claims, and the deliveries that Postgres refuses each by itself, with its errors.

    Raises:
        psycopg.Error: as `write_bisecting` does; none of the rows is claimed, unless the commit got no answer.
    """
    claims: list[Claim] = []

    def claim_batch(batch: Sequence[Delivery]) -> None:
        with connection.transaction():
            claimed = claim(connection, batch, worker, lease, held)
        claims.extend(claimed)

    with connection.transaction():
        row_ids = [delivery.row_id for delivery in deliveries]
        cursor = connection.cursor(row_factory=scalar_row)
        locked_ids = set(cursor.execute(query("lock_available_rows"), {"ids": row_ids}))
        refused = write_bisecting([delivery for delivery in deliveries if delivery.row_id in locked_ids], claim_batch)
    return claims, refused


def _log_dropped(rows: Iterable[_JobRow], dropped: set[Delivery]) -> None:
    by_id = {row.id: row for row in rows}
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
