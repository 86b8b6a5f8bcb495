"""Whether a connection pooler stands before Postgres, and what its sessions lack."""

import psycopg

from outbox.errors import SettingsError
from outbox.queries import query
from outbox.runtime import logs, postgres
from outbox.runtime.postgres import Connection


def connect_checked(database_url: str, name: str, *, pooled: bool) -> Connection:
    """Opens the first of a process' connections, as `postgres.connect` does, if the settings are right about poolers.

    Behind a pooler in transaction mode, what one process has prepared in a session is what another executes there, and
    its settings are the other's. So nothing is left in the session until it is known to be ours alone.

    Raises:
        SettingsError: a pooler in transaction mode stands between, and `pooled` is false.
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
    """Checks that a session is ours alone, where that can be found out.

    It nearly always can: of two connections that are open at once, both have the same session.
    """
    if _session(connection) == connection.info.backend_pid:
        return  # no pooler at all: one gives its clients numbers of its own
    try:
        with postgres.connect(database_url, "outbox check", pooled=True) as another:
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
    row = connection.execute(query("backend_pid"), prepare=False).fetchone()
    assert row is not None
    return int(row["session"])


def warn_about_missing_settings(connection: Connection) -> None:
    """Logs a warning if the sessions behind a pooler lack settings that we would give them, and what does.

    Raises:
        psycopg.OperationalError: Postgres is away.
    """
    if statements := [row["statement"] for row in connection.execute(query("missing_settings"))]:
        logs.get().warning("sessions lack settings", run="; ".join(statements))
