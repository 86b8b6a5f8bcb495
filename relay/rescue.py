"""Taking rows from workers that died."""

from outbox import logs
from outbox.postgres import Connection
from outbox.queries import query

_BATCH = 500


def rescue(connection: Connection) -> int:
    """Returns `running` rows whose lease has passed to `pending`, or to `dead`, and returns how many there were.

    Raises:
        psycopg.OperationalError: Postgres is away.
    """
    rows = connection.execute(query("rescue"), {"batch": _BATCH}).fetchall()
    log = logs.get()
    for row in rows:
        log.warning(
            "rescued row",
            type=row["task"],
            queue=row["queue"],
            row=row["id"],
            delivery=row["delivery"],
            attempt=row["attempts"],
            status=row["status"],
            request_id=row["request_id"],
        )
    return len(rows)
