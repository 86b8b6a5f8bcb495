"""Writing a batch of which some items may be refused: by halves, until the items that are the reason are found."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from outbox.postgres import AWAY

T = TypeVar("T")


def write_by_halves(items: Sequence[T], write: Callable[[Sequence[T]], None]) -> list[tuple[T, Exception]]:
    """Writes items with one call where that can be, and else all but those that are refused alone as well.

    That may be for a text that cannot be encoded, or a trigger that refuses a row.

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
