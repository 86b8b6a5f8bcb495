"""The states of outbox rows, and typed rows of statements."""

from enum import StrEnum
from operator import itemgetter
from typing import Any, TypeVar

from psycopg.rows import BaseRowFactory, RowMaker


class Status(StrEnum):
    """The states of a row; docs/design.md has the transitions."""

    PENDING = "pending"
    """It waits for the relay to hand it over."""
    ENQUEUED = "enqueued"
    """It was handed over: Redis has a job for it."""
    RUNNING = "running"
    """A worker holds its lease."""
    DONE = "done"
    """Its handler succeeded."""
    DEAD = "dead"
    """It is given up until an operator decides."""


R = TypeVar("R", bound=tuple[Any, ...])


def named(kind: type[R]) -> BaseRowFactory[R]:
    """Returns a psycopg row factory that makes each row a NamedTuple, with the columns that its fields name.

    A row costs little more than a tuple: columns are looked up once per statement.

    Args:
        kind: a NamedTuple with at least two fields.
    """
    fields, make = kind._fields, kind._make  # type: ignore[attr-defined]

    def factory(cursor: Any) -> RowMaker[R]:
        columns = [column.name for column in cursor.description or ()]
        if not columns:  # a statement that returns no rows
            return make  # type: ignore[no-any-return]
        pick = itemgetter(*map(columns.index, fields))
        return lambda values: make(pick(values))

    return factory
