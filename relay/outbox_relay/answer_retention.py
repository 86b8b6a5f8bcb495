"""Deletes the answers that the service stores under idempotency keys when their retention is over."""

from outbox.queries import query
from outbox.runtime.postgres import Connection
from outbox.runtime.settings import RelaySettings

BATCH = 1000
"""Upper bound of answers in one batch."""
INTERVAL = 60.0
"""Seconds from a batch that was not full to the next one."""


def delete_old_answers(connection: Connection, settings: RelaySettings) -> float | None:
    """Deletes one batch; returns the seconds until the next, or None if no answers are left.

    Raises:
        psycopg.Error: Postgres is away, or refuses.
    """
    asked = {"retention": settings.idempotency_retention, "batch": BATCH}
    deleted = connection.execute(query("delete_old_answers"), asked).rowcount
    return 0.0 if deleted == BATCH else None
