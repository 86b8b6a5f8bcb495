"""Typed rows, which are filled by column name."""

from typing import NamedTuple

import pytest

from outbox.row import Status, named
from tests.conftest import Connection


class Pair(NamedTuple):
    """Two columns."""

    first: int
    second: str


@pytest.mark.parametrize("columns", ["1 AS first, 'a' AS second", "'a' AS second, now() AS third, 1 AS first"])
def test_a_field_is_the_column_of_its_name(connection: Connection, columns: str) -> None:
    """The order of columns does not matter, and further columns are ignored."""
    found = connection.cursor(row_factory=named(Pair)).execute(f"SELECT {columns}".encode()).fetchall()
    assert found == [Pair(1, "a")]


def test_a_column_that_is_missing_is_an_error(connection: Connection) -> None:
    """A statement that does not fit its type fails at the first row."""
    with pytest.raises(ValueError, match="second"):
        connection.cursor(row_factory=named(Pair)).execute("SELECT 1 AS first").fetchall()


def test_a_statement_without_rows_is_no_error(connection: Connection) -> None:
    """Such as LISTEN, whose result has no columns."""
    assert connection.cursor(row_factory=named(Pair)).execute("LISTEN outbox").statusmessage == "LISTEN"


def test_a_state_is_the_text_in_the_table(connection: Connection) -> None:
    """As a parameter, in an array, and compared with a returned value."""
    found = connection.execute("SELECT %s::text AS one, %s::text[] AS all", [Status.DEAD, list(Status)]).fetchone()
    assert found is not None
    assert found["one"] == Status.DEAD
    assert found["all"] == ["pending", "enqueued", "running", "done", "dead"]
