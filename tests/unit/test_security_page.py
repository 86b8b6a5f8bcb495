"""SECURITY.md says which test shows each of its lines: they all exist."""

import re
from pathlib import Path


def test_every_test_that_the_page_names_exists() -> None:
    """A line of the table is worth what its test is."""
    named = set(re.findall(r"`(test_\w+)`", Path("SECURITY.md").read_text(encoding="utf-8")))
    defined: set[str] = set()
    for path in Path("tests").rglob("test_*.py"):
        defined.update(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(named) > 40
    assert named - defined == set()
