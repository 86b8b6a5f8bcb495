"""Writes a batch by bisection, so that items that are refused do not block the others."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from outbox.postgres import AWAY

T = TypeVar("T")


def write_by_halves(items: Sequence[T], write: Callable[[Sequence[T]], None]) -> list[tuple[T, Exception]]:
    """Writes all items in one call; if that fails, halves the batch until only the items that are refused are left.

    A text that cannot be encoded is one, or a row that a trigger refuses.

    Args:
        items: what to write.
        write: writes some of them, all or none.

    Returns:
        The items that cannot be written, and why.

    Raises:
        psycopg.Error: Postgres is away, or a lock could not be had; what was written stays written.
    """
    if not items:
        return []
    try:
        write(items)
    except AWAY:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is found out whose fault it is
        if len(items) == 1:
            return [(items[0], error)]
        middle = len(items) // 2
        return write_by_halves(items[:middle], write) + write_by_halves(items[middle:], write)
    return []
