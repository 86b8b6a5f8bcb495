"""Checks that a database can serve: its encoding, and its migrations."""

from typing import Any

import psycopg

from outbox.errors import NotMigratedError, UnsupportedDatabaseError
from outbox.queries import query, sql_folder


def migrations() -> list[str]:
    """Returns the ids of this version's migrations, in order."""
    return sorted(path.stem for path in (sql_folder() / "migrations").glob("*.sql"))


def check_encoding(connection: psycopg.BaseConnection[Any]) -> None:
    """Checks that a database is in UTF-8. Postgres reports its encoding at connect, so this takes no statement.

    Raises:
        UnsupportedDatabaseError: it is not.
    """
    encoding = connection.info.parameter_status("server_encoding")
    if encoding not in {"UTF8", None}:  # a pooler may not report it
        raise UnsupportedDatabaseError(
            f"the database {connection.info.dbname} is in {encoding}, not in UTF-8, and cannot hold every name: create"
            " one with ENCODING 'UTF8' TEMPLATE template0, and name it in DATABASE_URL"
        )


def check_applied(applied: set[str]) -> None:
    """Checks that the database has every migration of this version; it may have newer ones.

    Raises:
        NotMigratedError: it lacks some.
    """
    if missing := [name for name in migrations() if name not in applied]:
        raise NotMigratedError(f"the database is not migrated (it lacks {', '.join(missing)}): run 'outbox migrate'")


def check_migrated(connection: psycopg.Connection[Any]) -> None:
    """Checks a database's encoding and migrations.

    Raises:
        UnsupportedDatabaseError: it is not in UTF-8.
        NotMigratedError: it was never migrated, or lacks migrations.
    """
    check_encoding(connection)
    try:
        applied = {row["migration_id"] for row in connection.execute(query("applied_migrations"))}
    except psycopg.errors.UndefinedTable:
        applied = set()
    check_applied(applied)
