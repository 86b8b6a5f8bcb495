"""Warns about rows in queues that no relay or worker serves."""

from typing import NamedTuple

from outbox.queries import query
from outbox.row import named
from outbox.runtime import logs
from outbox.runtime.postgres import Connection
from outbox.runtime.settings import RelaySettings

INTERVAL = 60.0
"""Seconds between two checks."""
MAX_ROWS = 10_000
"""Upper bound of the rows that are counted: of each queue's pending ones, and of its enqueued ones."""


class _UnservedQueue(NamedTuple):
    """A row of the statement `unserved_queues`."""

    queue: str
    rows: int


def warn_about_unserved_queues(connection: Connection, settings: RelaySettings) -> None:
    """Logs an error for each queue that holds pending or enqueued rows and is not in `OUTBOX_QUEUES`.

    Raises:
        psycopg.OperationalError: Postgres is away.
    """
    cursor = connection.cursor(row_factory=named(_UnservedQueue))
    for found in cursor.execute(query("unserved_queues"), {"queues": list(settings.queues), "most": MAX_ROWS}):
        logs.get().error("rows wait in a queue that OUTBOX_QUEUES does not name", queue=found.queue, rows=found.rows)
