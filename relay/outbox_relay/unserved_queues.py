"""Telling of rows that nobody will hand over, or take from Redis."""

from outbox.queries import query
from outbox.runtime import logs
from outbox.runtime.postgres import Connection
from outbox.runtime.settings import RelaySettings

MAX_ROWS = 10_000
"""Pending rows of a queue, and enqueued ones, that are counted at most."""


def warn_about_unserved_queues(connection: Connection, settings: RelaySettings) -> None:
    """Logs an error for each queue that holds pending or enqueued rows and is not in `OUTBOX_QUEUES`.

    Raises:
        psycopg.OperationalError: Postgres is away.
    """
    for row in connection.execute(query("unserved_queues"), {"queues": list(settings.queues), "most": MAX_ROWS}):
        logs.get().error("rows wait in a queue that OUTBOX_QUEUES does not name", queue=row["queue"], rows=row["rows"])
