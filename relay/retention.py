"""Deleting done rows whose time is over, and telling of rows that nobody will hand over."""

from typing import Any

import psycopg

from outbox import logs
from outbox.queries import query
from outbox.settings import RelaySettings

BATCH = 1000


def retention(connection: psycopg.Connection[dict[str, Any]], settings: RelaySettings) -> int:
    """Deletes one batch of old `done` rows and returns how many there were; `dead` rows stay.

    Raises:
        psycopg.OperationalError: Postgres is away.
    """
    return connection.execute(query("retention"), {"retention": settings.retention, "batch": BATCH}).rowcount


def tell_of_unserved_queues(connection: psycopg.Connection[dict[str, Any]], settings: RelaySettings) -> None:
    """Logs an error for each queue that holds rows and is not in `OUTBOX_QUEUES`.

    Raises:
        psycopg.OperationalError: Postgres is away.
    """
    for row in connection.execute(query("unserved_queues"), {"queues": list(settings.queues)}):
        logs.get().error("rows wait in a queue that OUTBOX_QUEUES does not name", queue=row["queue"], rows=row["rows"])
