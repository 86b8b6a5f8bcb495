"""Provides databases for tests: clones of a migrated one, reused after a test unless it changed the schema."""

from collections.abc import Callable
from typing import LiteralString

import psycopg
import psycopg.sql

_MAX_ROWS = 5_000
"""Rows to delete at most; above that, a new database is cheaper."""

# Run before the tables are emptied: a session that is about to end may still write.
_END_OTHERS: LiteralString = """
SELECT bool_and(pg_terminate_backend(pid, 5000))
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""

# Creating or altering an object writes to a catalog, and dropping one deletes a row from it.
_CATALOGS = (
    "pg_class",
    "pg_attribute",
    "pg_attrdef",
    "pg_constraint",
    "pg_index",
    "pg_namespace",
    "pg_proc",
    "pg_statistic",
    "pg_trigger",
    "pg_type",
    "_yoyo_migration",
)
_SETTINGS: LiteralString = """
SELECT setconfig FROM pg_db_role_setting JOIN pg_database ON pg_database.oid = setdatabase
WHERE datname = current_database()
"""

_EMPTY: LiteralString = """
DELETE FROM outbox;
DELETE FROM verify_emails;
DELETE FROM users;
DELETE FROM idempotency_keys;
SELECT setval(seqrelid::regclass, 1, false) FROM pg_sequence;
"""


class Databases:
    """A pool of migrated, empty databases, one per test."""

    def __init__(self, create: Callable[[str | None], str], template: str) -> None:
        self._create = create
        self._template = template
        self._schema: object = None
        self._emptied: list[str] = []

    def lend(self) -> str:
        """Returns the URL of a database."""
        if self._emptied:
            return self._emptied.pop()
        url = self._create(self._template)
        if self._schema is None:
            with psycopg.connect(url, autocommit=True) as connection:
                self._schema = _schema(connection)
        return url

    def take_back(self, url: str) -> None:
        """Empties a database for the next test, or abandons it if that would not restore it."""
        try:
            with psycopg.connect(url, autocommit=True, connect_timeout=5) as connection:
                connection.execute(_END_OTHERS)
                if _schema(connection) != self._schema:
                    return
                (rows,) = connection.execute("SELECT count(*) FROM outbox").fetchone() or (0,)
                if rows <= _MAX_ROWS:
                    connection.execute(_EMPTY)
                    self._emptied.append(url)
        except psycopg.Error:
            return  # the test stopped the server or dropped the database


def _schema(connection: psycopg.Connection) -> object:
    """Returns a value that every change of the schema or the settings changes."""
    parts = (
        psycopg.sql.SQL("SELECT count(*), max(xmin::text::bigint) FROM {}").format(psycopg.sql.Identifier(catalog))
        for catalog in _CATALOGS
    )
    catalogs = connection.execute(psycopg.sql.SQL(" UNION ALL ").join(parts)).fetchall()
    return catalogs, connection.execute(_SETTINGS).fetchall()
