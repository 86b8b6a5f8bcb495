"""Databases for tests: cloned from a migrated one, and handed on emptied where a test has left the schema alone."""

from collections.abc import Callable
from typing import LiteralString

import psycopg
import psycopg.sql

_MOST_ROWS = 5_000
"""Rows that are emptied; a new database is cheaper than to delete more."""

# Others first: a session that is about to end may still write.
_END_OTHERS: LiteralString = """
SELECT bool_and(pg_terminate_backend(pid, 5000))
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""

# Who creates or alters something writes to a catalog, and who drops something leaves one row less in it.
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
SELECT setval(seqrelid::regclass, 1, false) FROM pg_sequence;
"""


class Databases:
    """Migrated, empty databases, one for each test."""

    def __init__(self, create: Callable[[str | None], str], template: str) -> None:
        self._create = create
        self._template = template
        self._schema: object = None
        self._emptied: list[str] = []

    def lend(self) -> str:
        """Returns the URL of one."""
        if self._emptied:
            return self._emptied.pop()
        url = self._create(self._template)
        if self._schema is None:
            with psycopg.connect(url, autocommit=True) as connection:
                self._schema = _schema(connection)
        return url

    def take_back(self, url: str) -> None:
        """Empties one for the next test, or leaves it where that would not make it as new."""
        try:
            with psycopg.connect(url, autocommit=True, connect_timeout=5) as connection:
                connection.execute(_END_OTHERS)
                if _schema(connection) != self._schema:
                    return
                (rows,) = connection.execute("SELECT count(*) FROM outbox").fetchone() or (0,)
                if rows <= _MOST_ROWS:
                    connection.execute(_EMPTY)
                    self._emptied.append(url)
        except psycopg.Error:
            return  # the test has taken it down


def _schema(connection: psycopg.Connection) -> object:
    """Returns what no change of the schema leaves as it was."""
    parts = (
        psycopg.sql.SQL("SELECT count(*), max(xmin::text::bigint) FROM {}").format(psycopg.sql.Identifier(catalog))
        for catalog in _CATALOGS
    )
    catalogs = connection.execute(psycopg.sql.SQL(" UNION ALL ").join(parts)).fetchall()
    return catalogs, connection.execute(_SETTINGS).fetchall()
