"""The statements of `sql/queries.sql`, by name."""

import re
from functools import cache
from pathlib import Path
from typing import LiteralString


def sql_folder() -> Path:
    """Returns the folder `sql`, which is in the package in an installed wheel and beside it in a checkout."""
    packaged = Path(__file__).parent / "sql"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "sql"


@cache
def _statements() -> dict[str, LiteralString]:
    text = (sql_folder() / "queries.sql").read_text(encoding="utf-8")
    blocks = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)[1:]
    names, bodies = blocks[::2], blocks[1::2]
    return {
        name: "\n".join(line for line in body.splitlines() if not line.startswith("--")).strip().rstrip(";")
        for name, body in zip(names, bodies, strict=True)
    }


def query(name: str) -> LiteralString:
    """Returns the text of a named statement, without its comment.

    Raises:
        KeyError: there is no statement of that name.
    """
    return _statements()[name]
