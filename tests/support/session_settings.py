"""Settings that a database gives to its new sessions."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import psycopg.sql
import pytest
from psycopg.conninfo import conninfo_to_dict


@contextmanager
def set_for_database(url: str, name: str, value: str) -> Iterator[None]:
    """Gives a setting to new sessions of a database; skips the test if this Postgres does not have the setting."""
    with psycopg.connect(url, autocommit=True) as connection:
        database = psycopg.sql.Identifier(str(conninfo_to_dict(url)["dbname"]))
        setting = psycopg.sql.Identifier(name)
        if connection.execute("SELECT current_setting(%s, true)", [name]).fetchone() == (None,):
            pytest.skip(f"this Postgres has no {name}")
        connection.execute(
            psycopg.sql.SQL("ALTER DATABASE {} SET {} = {}").format(database, setting, psycopg.sql.Literal(value))
        )
        yield
        connection.execute(psycopg.sql.SQL("ALTER DATABASE {} RESET {}").format(database, setting))
