"""Detects a connection pooler in front of Postgres, and settings that its sessions lack."""

import psycopg

from outbox.errors import SettingsError
from outbox.queries import query
from outbox.runtime import logs, postgres
from outbox.runtime.postgres import Connection


def connect_checked(database_url: str, name: str, *, pooled: bool) -> Connection:
    """Opens a process' first connection as `postgres.connect` does, and checks `pooled`.

    Behind a pooler in transaction mode, processes share sessions, and with them prepared statements and settings. So
    this leaves nothing in the session before it knows that the session is ours alone.

    Raises:
        SettingsError: the URL leads through a pooler in transaction mode, and `pooled` is false.
        psycopg.OperationalError: Postgres is away or refuses.
    """
    connection = postgres.connect_unlimited(database_url, name, pooled=pooled)
    if pooled:
        return connection
    try:
        _check_unpooled(connection, database_url)
        postgres.pin_session(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_unpooled(connection: Connection, database_url: str) -> None:
    """Checks that a session is ours alone.

    Behind a pooler in transaction mode, two idle connections nearly always get the same session.
    """
    if _session(connection) == connection.info.backend_pid:
        return  # no pooler: a pooler gives its clients process ids of its own
    try:
        with postgres.connect(database_url, "outbox check", pooled=True) as second:
            # Asked several times: in a busy pool the two may get different sessions.
            is_shared = any(_session(second) == _session(connection) for _ in range(20))
    except psycopg.OperationalError:
        return  # in session mode, the pool may have no second session
    if is_shared:
        raise SettingsError(
            "DATABASE_URL leads through a connection pooler in transaction mode:"
            " set OUTBOX_TRANSACTION_POOLING=true, or connect to Postgres directly"
        )


def _session(connection: Connection) -> int:
    row = connection.execute(query("backend_pid"), prepare=False).fetchone()
    assert row is not None
    return int(row["session"])


def warn_about_missing_settings(connection: Connection) -> None:
    """Warns if sessions behind a pooler lack settings that we would set, with the statements that add them.

    Raises:
        psycopg.OperationalError: Postgres is away.
    """
    if statements := [row["statement"] for row in connection.execute(query("missing_settings"))]:
        logs.get().warning("sessions lack settings", run="; ".join(statements))
