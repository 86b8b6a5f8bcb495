"""The tests that SECURITY.md names exist."""

import re
from pathlib import Path


def test_every_test_that_the_page_names_exists() -> None:
    """A line of its tables without an existing test would be an unproved claim."""
    named = set(re.findall(r"`(test_\w+)`", Path("SECURITY.md").read_text(encoding="utf-8")))
    defined: set[str] = set()
    for path in Path("tests").rglob("test_*.py"):
        defined.update(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(named) > 40
    assert named - defined == set()
