"""Limits of a log line: its fields come from rows, Redis and requests, and may have any length."""

from pydantic_core import to_json
from structlog.typing import EventDict

FIELD_LIMIT = 2_000
"""Characters that a long line shows of each field."""

LINE_LIMIT = 4_000
"""Characters of a line above which its fields are cut."""

LONGEST_LINE = 100_000
"""Upper bound of characters of a line with cut fields: a traceback in which every character is escaped has 60,000."""


def cut_fields(event: EventDict) -> EventDict:
    """Returns an event with each field cut to `FIELD_LIMIT` characters; a traceback has its own limit."""
    cut_event: EventDict = {}
    for name, value in event.items():
        text = value if isinstance(value, str) else _text(value)
        is_whole = name == "exception" or len(text) <= FIELD_LIMIT
        cut_event[name] = value if is_whole else text[:FIELD_LIMIT]
    return cut_event


def _text(value: object) -> str:
    """Returns a field as JSON, or as Python's `repr` if JSON cannot hold it."""
    try:
        return to_json(value, fallback=str, inf_nan_mode="strings").decode()
    except ValueError:  # lone surrogates
        return repr(value)
