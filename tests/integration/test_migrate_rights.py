"""Rights of the role that migrates."""

import secrets
from collections.abc import Iterator

import psycopg
import psycopg.sql
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from outbox.errors import RightsError
from outbox.runtime import schema
from outbox.runtime.migrations import migrate


@pytest.fixture
def limited_url(empty_url: str) -> Iterator[str]:
    """The empty database, for a role that may use its schema and not create in it."""
    name = f"outbox_test_{secrets.token_hex(6)}"
    role = psycopg.sql.Identifier(name)
    with psycopg.connect(empty_url, autocommit=True) as connection:
        for statement in (
            "CREATE ROLE {} LOGIN PASSWORD 'of a test'",
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
            "GRANT USAGE ON SCHEMA public TO {}",
        ):
            connection.execute(psycopg.sql.SQL(statement).format(role))
        yield make_conninfo(empty_url, user=name, password="of a test")
        connection.execute(psycopg.sql.SQL("DROP OWNED BY {}").format(role))
        connection.execute(psycopg.sql.SQL("DROP ROLE {}").format(role))


def test_a_role_that_may_not_create_tables_is_refused(empty_url: str, limited_url: str) -> None:
    """The sentence has the statement that grants the right; after it, the role can migrate."""
    with pytest.raises(RightsError, match="run GRANT CREATE ON SCHEMA public TO outbox_test_") as caught:
        migrate(limited_url)
    grant = str(caught.value).partition("run ")[2].partition(",")[0]
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute(grant)
    assert migrate(limited_url) == schema.migrations()


def test_a_role_without_any_schema_is_refused(empty_url: str, limited_url: str) -> None:
    """The sentence says that the role may use no schema of its search_path."""
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
        role = psycopg.sql.Identifier(str(conninfo_to_dict(limited_url)["user"]))
        connection.execute(psycopg.sql.SQL("REVOKE USAGE ON SCHEMA public FROM {}").format(role))
    with pytest.raises(RightsError, match="search_path"):
        migrate(limited_url)


def test_a_migrated_database_needs_no_right_to_create(empty_url: str, limited_url: str) -> None:
    """The owner of the tables can run it again if there is nothing to do."""
    role = psycopg.sql.Identifier(str(conninfo_to_dict(limited_url)["user"]))
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute(psycopg.sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(role))
        assert migrate(limited_url) == schema.migrations()
        connection.execute(psycopg.sql.SQL("REVOKE CREATE ON SCHEMA public FROM {}").format(role))
    assert migrate(limited_url) == []
