"""Applies `sql/migrations`, one process at a time."""

from typing import Any

import psycopg
from yoyo import read_migrations
from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
from yoyo.connections import parse_uri

from outbox import logs
from outbox.queries import query, sql_folder


class _Backend(PostgresqlPsycopgBackend):  # type: ignore[misc]  # yoyo is untyped
    """yoyo's backend on a connection string that libpq reads itself, so that all of its options work."""

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        super().__init__(parse_uri("postgresql+psycopg:///"), "_yoyo_migration")

    def copy(self) -> "_Backend":
        return _Backend(self._database_url)

    def connect(self, dburi: Any) -> psycopg.Connection[Any]:  # noqa: ARG002 - yoyo's signature
        return _connect(self._database_url, autocommit=True)


def _connect(database_url: str, *, autocommit: bool = False) -> psycopg.Connection[Any]:
    """Opens a connection that a pooler may stand in: it prepares no statements."""
    return psycopg.connect(
        database_url, autocommit=autocommit, prepare_threshold=None, application_name="outbox migrate"
    )


def migrate(database_url: str) -> list[str]:
    """Applies the migrations that the database lacks, each in its own transaction.

    Postgres' advisory lock lets one process in at a time; the others find nothing left to do. yoyo's own lock is a
    row that a killed process leaves behind; inside ours it can only be such a leftover, so it is removed.

    Args:
        database_url: the database.

    Returns:
        The ids of the migrations applied now, in order; empty where there were none to apply.

    Raises:
        psycopg.OperationalError: Postgres is away.
    """
    # Not postgres.connect: this transaction idles for as long as the migrations take.
    with _connect(database_url) as connection:
        connection.execute(query("unlimit_transaction"))
        connection.execute(query("lock_migrations"))
        with _Backend(database_url) as backend:
            backend.init_database()
            backend.break_lock()
            with backend.lock():
                todo = backend.to_apply(read_migrations(str(sql_folder() / "migrations")))
                backend.apply_migrations(todo)
        applied = [migration.id for migration in todo]
    logs.get().info("db migrated", applied=applied)
    return applied
