"""The statements of sql/queries.sql."""

import re
from pathlib import Path

import pytest

from outbox.queries import query
from tests.support.statements import NAMES, TEXT


def test_names_of_statements_are_unique() -> None:
    """A second block with the same name would silently replace the first."""
    assert len(NAMES) == len(set(NAMES)) > 15


@pytest.mark.parametrize("name", NAMES)
def test_every_statement_states_its_purpose(name: str) -> None:
    """A comment under the name does. It is not sent to Postgres, and neither is a second statement."""
    assert re.search(rf"^-- name: {name}\n-- \S", TEXT, re.MULTILINE)
    text = query(name)
    assert text
    assert "--" not in text
    assert ";" not in text


def test_every_statement_is_used() -> None:
    """No statement has lost its caller."""
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("outbox", "service", "relay", "worker")
        for path in Path(folder).rglob("*.py")
    )
    assert [name for name in NAMES if f'query("{name}")' not in code] == []


def test_an_unknown_name_is_an_error() -> None:
    """The first test that runs the code finds a typing error."""
    with pytest.raises(KeyError, match="no_such_statement"):
        query("no_such_statement")
