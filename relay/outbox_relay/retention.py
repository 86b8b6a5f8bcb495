"""Deletes `done` rows when their retention time is over."""

from functools import partial

from psycopg.rows import scalar_row

from outbox.queries import query
from outbox.runtime.postgres import Connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.batches import Batches

BATCH = 1000
"""Upper bound of rows in one batch."""
INTERVAL = 60.0
"""Seconds from a batch that found nothing to the next one."""
SMALLER_PAUSE = 0.5
"""Seconds from a refused batch to the next, smaller one: each may wait for a lock."""
LEFT_OUT = 60.0
"""Seconds until the next try to delete a row that was refused."""


class Retention:
    """One relay's retention.

    A row cannot be deleted while a foreign key of another table keeps it, or while a session has locked a row that
    would be deleted with it. Such rows are left out, and the others are deleted.
    """

    def __init__(self, settings: RelaySettings) -> None:
        self._settings = settings
        self._batches = Batches[int](BATCH, "done rows cannot be deleted", LEFT_OUT)

    def step(self, connection: Connection) -> float | None:
        """Deletes one batch; returns the seconds until the next, or None if no rows are left.

        Raises:
            psycopg.Error: Postgres is away, or refuses for a reason that is not in the rows.
        """
        deleted = self.delete(connection)
        if deleted is None:
            return SMALLER_PAUSE
        return 0.0 if deleted else None

    def delete(self, connection: Connection) -> int | None:
        """Deletes one batch of old `done` rows; `dead` rows stay.

        Returns:
            How many rows it deleted; None if Postgres has refused the batch.

        Raises:
            psycopg.Error: as for `step`.
        """
        return self._batches.write(connection, partial(self._delete, connection))

    def _delete(self, connection: Connection, limit: int) -> int:
        retention, left_out = self._settings.retention, self._batches.left_out.rows()
        with connection.transaction():
            connection.execute(query("limit_transaction_lock_wait"))
            row_ids = self._batches.tried = (
                connection.cursor(row_factory=scalar_row)
                .execute(query("rows_past_retention"), {"retention": retention, "batch": limit, "left_out": left_out})
                .fetchall()
            )
            if row_ids:
                connection.execute(query("delete_rows"), {"ids": row_ids})
        return len(row_ids)
