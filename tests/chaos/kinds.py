"""Lists all kinds of faults, and selects from them by pattern."""

from collections.abc import Iterable
from fnmatch import fnmatch

from tests.chaos import (
    connection_faults,
    failovers,
    foreign_faults,
    large_row_faults,
    mail_faults,
    mail_outages,
    process_faults,
    server_faults,
)
from tests.chaos.faults import Kind

ALL: tuple[Kind, ...] = (
    *process_faults.KINDS,
    *server_faults.KINDS,
    *failovers.KINDS,
    *connection_faults.KINDS,
    *mail_faults.KINDS,
    *mail_outages.KINDS,
    *foreign_faults.KINDS,
    *large_row_faults.KINDS,
)


class UnknownKindError(Exception):
    """A pattern matches no kind of fault."""


def select(patterns: Iterable[str]) -> list[Kind]:
    """Returns the kinds with a name that matches a pattern such as `redis.*`, or all if there is no pattern.

    Raises:
        UnknownKindError: a pattern matches no kind.
    """
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(fnmatch(kind.name, pattern) for kind in ALL):
            names = ", ".join(kind.name for kind in ALL)
            raise UnknownKindError(f"no kind of fault matches {pattern!r}; the kinds are {names}")
    return [kind for kind in ALL if not patterns or any(fnmatch(kind.name, pattern) for pattern in patterns)]
