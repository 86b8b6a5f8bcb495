"""Writes a batch by bisection, so that items that are refused do not block the others."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import psycopg

from outbox.runtime.postgres import AWAY

T = TypeVar("T")


def write_by_halves(items: Sequence[T], write: Callable[[Sequence[T]], None]) -> list[tuple[T, Exception]]:
    """Writes all items in one call; if that fails, halves the batch until only the items that are refused are left.

    A text that cannot be encoded is one, a row that a trigger refuses, or one that takes longer than a statement may.

    Args:
        items: what to write.
        write: writes some of them, all or none.

    Returns:
        The items that cannot be written, and why.

    Raises:
        psycopg.Error: Postgres is away, or has refused for what is no item's fault: a lock that could not be had, a
            deadlock, a full disk. What was written stays written.
    """
    if not items:
        return []
    try:
        write(items)
    except psycopg.errors.QueryCanceled as error:  # a time limit, and all of them may have been too much for it
        return _halve(items, write, error)
    except AWAY:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is found out whose fault it is
        return _halve(items, write, error)
    return []


def _halve(items: Sequence[T], write: Callable[[Sequence[T]], None], error: Exception) -> list[tuple[T, Exception]]:
    if len(items) == 1:
        return [(items[0], error)]
    middle = len(items) // 2
    return write_by_halves(items[:middle], write) + write_by_halves(items[middle:], write)
