"""Triggers on the outbox that refuse statements, as an application's own may do."""

from typing import LiteralString

import psycopg.sql

from tests.conftest import Connection

_REFUSING: LiteralString = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$;
CREATE TRIGGER refusing BEFORE UPDATE {of} ON outbox FOR EACH ROW WHEN ({row_id} IN (0, NEW.id))
EXECUTE FUNCTION refuse();
"""


def refuse_updates(connection: Connection, *, row_id: int = 0, of_status: bool = False) -> None:
    """Refuses updates until `allow_updates`.

    Args:
        connection: in autocommit mode.
        row_id: the row whose updates are refused; 0 for all rows.
        of_status: whether only updates of the status are refused.
    """
    of = psycopg.sql.SQL("OF status" if of_status else "")
    connection.execute(psycopg.sql.SQL(_REFUSING).format(of=of, row_id=psycopg.sql.Literal(row_id)))


def allow_updates(connection: Connection) -> None:
    """Removes the trigger."""
    connection.execute("DROP FUNCTION refuse CASCADE")
