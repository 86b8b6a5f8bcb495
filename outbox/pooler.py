"""Whether a connection pooler stands before Postgres, and what its sessions lack."""

import psycopg
from psycopg.rows import dict_row

from outbox import logs, postgres
from outbox.errors import SettingsError
from outbox.postgres import Connection
from outbox.queries import query


def check_unpooled(connection: Connection, database_url: str) -> None:
    """Checks that a session is ours alone, unless the settings say that it is not.

    Behind a pooler in transaction mode, what one process has prepared in a session is what another executes there.
    It is found out where it can be, which is nearly always: two connections that are open at once have one session.

    Args:
        connection: one that was opened without `pooled`.
        database_url: where it leads.

    Raises:
        SettingsError: a pooler in transaction mode stands between.
        psycopg.OperationalError: Postgres is away.
    """
    if _session(connection) == connection.info.backend_pid:
        return  # no pooler at all: one gives its clients numbers of its own
    try:
        with postgres.LimitedConnection.connect(
            database_url, row_factory=dict_row, **postgres.options("outbox check", pooled=True)
        ) as another:
            # Once may be chance: on a busy pool the two are given different sessions.
            is_shared = any(_session(another) == _session(connection) for _ in range(20))
    except psycopg.OperationalError:
        return  # in session mode, a pool may have none to spare
    if is_shared:
        raise SettingsError(
            "DATABASE_URL leads through a connection pooler in transaction mode:"
            " set OUTBOX_TRANSACTION_POOLING=true, or name Postgres itself"
        )


def _session(connection: Connection) -> int:
    row = connection.execute(query("session"), prepare=False).fetchone()
    assert row is not None
    return int(row["session"])


def tell_of_missing_limits(connection: Connection) -> None:
    """Logs a warning if the sessions behind a pooler lack the limits that we would set, and what gives them some.

    Raises:
        psycopg.OperationalError: Postgres is away.
    """
    if statements := [row["statement"] for row in connection.execute(query("missing_limits"))]:
        logs.get().warning("sessions have no limits", run="; ".join(statements))
