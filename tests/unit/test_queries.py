"""The statements of sql/queries.sql."""

import re
from pathlib import Path

import pytest

from outbox.queries import query
from tests.support.statements import NAMES, TEXT


def test_every_statement_has_a_name_of_its_own() -> None:
    """A second block of a name would silently replace the first."""
    assert len(NAMES) == len(set(NAMES)) > 15


@pytest.mark.parametrize("name", NAMES)
def test_every_statement_says_what_it_is_for(name: str) -> None:
    """A line of purpose stands under the name; it does not go to Postgres, nor does a second statement."""
    assert re.search(rf"^-- name: {name}\n-- \S", TEXT, re.MULTILINE)
    text = query(name)
    assert text
    assert "--" not in text
    assert ";" not in text


def test_every_statement_is_used() -> None:
    """No statement is left behind by code that has gone."""
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("outbox", "service", "relay", "worker")
        for path in Path(folder).rglob("*.py")
    )
    assert [name for name in NAMES if f'query("{name}")' not in code] == []


def test_an_unknown_name_is_an_error() -> None:
    """A typing mistake is found by the first test that runs the code, not by Postgres."""
    with pytest.raises(KeyError, match="no_such_statement"):
        query("no_such_statement")
