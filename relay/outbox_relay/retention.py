"""Deleting done rows whose time is over."""

from functools import partial

from outbox.queries import query
from outbox.runtime.postgres import Connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.batches import Batches

BATCH = 1000
INTERVAL = 60.0
"""Seconds between two deletions, unless there was a full batch of them."""
SMALLER_PAUSE = 0.5
"""Seconds until a smaller batch is tried after one that was refused: each may have waited for a lock."""
LEFT_OUT = 60.0
"""Seconds until a row is tried again that cannot be deleted."""


class Retention:
    """One relay's retention.

    Somebody may have locked a row of theirs that refers to one of these and would go with it, or has a foreign key that
    keeps it: such rows are found, and the others are deleted.
    """

    def __init__(self, settings: RelaySettings) -> None:
        self._settings = settings
        self._batches = Batches[int](BATCH, "done rows cannot be deleted", LEFT_OUT)

    def step(self, connection: Connection) -> float:
        """Deletes one batch and returns the seconds until the next.

        Raises:
            psycopg.Error: Postgres is away, or refuses for what is no row's fault.
        """
        deleted = self.delete(connection)
        if deleted is None:
            return SMALLER_PAUSE
        return 0.0 if deleted else INTERVAL

    def delete(self, connection: Connection) -> int | None:
        """Deletes one batch of old `done` rows; `dead` rows stay.

        Returns:
            How many there were; None where Postgres has refused to delete them.

        Raises:
            psycopg.Error: as for `step`.
        """
        return self._batches.write(connection, partial(self._delete, connection))

    def _delete(self, connection: Connection, most: int) -> int:
        with connection.transaction():
            connection.execute(query("limit_transaction_lock_wait"))
            found = connection.execute(
                query("rows_past_retention"),
                {"retention": self._settings.retention, "batch": most, "left_out": self._batches.left_out.rows()},
            )
            ids = self._batches.tried = [row["id"] for row in found]
            if ids:
                connection.execute(query("delete_rows"), {"ids": ids})
        return len(ids)
