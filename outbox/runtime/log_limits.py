"""Limits of a log line's length: fields come from rows, from Redis and from requests, and may be of any length."""

from pydantic_core import to_json
from structlog.typing import EventDict

FIELD_LIMIT = 2_000
"""Characters of a field that a long line shows."""

LINE_LIMIT = 4_000
"""Characters of a line at which its fields are cut."""

LONGEST_LINE = 100_000
"""Characters of a line whose fields were cut: a traceback that is escaped from end to end has 60,000."""


def cut(event: EventDict) -> EventDict:
    """Returns a line's fields, each cut to `FIELD_LIMIT` characters; a traceback has its own limit."""
    short: EventDict = {}
    for name, value in event.items():
        text = value if isinstance(value, str) else _text(value)
        is_short = name == "exception" or len(text) <= FIELD_LIMIT
        short[name] = value if is_short else text[:FIELD_LIMIT]
    return short


def _text(value: object) -> str:
    """Returns a field as JSON, or as Python's `repr` if JSON cannot hold it."""
    try:
        return to_json(value, fallback=str, inf_nan_mode="strings").decode()
    except ValueError:  # lone surrogates
        return repr(value)
