"""Deleting done rows whose time is over."""

from outbox.postgres import Connection
from outbox.queries import query
from outbox.settings import RelaySettings

BATCH = 1000


def retention(connection: Connection, settings: RelaySettings) -> int:
    """Deletes one batch of old `done` rows and returns how many there were; `dead` rows stay.

    Raises:
        psycopg.OperationalError: Postgres is away.
    """
    return connection.execute(query("retention"), {"retention": settings.retention, "batch": BATCH}).rowcount
