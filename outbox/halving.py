"""Writing a batch of which some items may be refused: by halves, until the items that are the reason are found."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from outbox.postgres import AWAY

T = TypeVar("T")

MOST_REFUSED = 10
"""Items refused one by one, with none written, after which the statement itself is taken to be the reason."""


def write_by_halves(
    items: Sequence[T], write: Callable[[Sequence[T]], None], refuse: Callable[[T, Exception], None]
) -> None:
    """Writes items with one call where that can be, and else all but those that are refused alone as well.

    That may be for a text that cannot be encoded, or a trigger that refuses a row.

    Args:
        items: what to write.
        write: writes some of them, all or none.
        refuse: called with each item that cannot be written, and why.

    Raises:
        Exception: an outage, or what `write` raised for everything that was tried.
    """
    written = refused = 0

    def write_some(some: Sequence[T]) -> None:
        nonlocal written, refused
        try:
            write(some)
        except AWAY:
            raise
        except Exception as error:
            if len(some) > 1:
                middle = len(some) // 2
                write_some(some[:middle])
                write_some(some[middle:])
                return
            refused += 1
            if refused == MOST_REFUSED and not written:
                raise
            refuse(some[0], error)
        else:
            written += len(some)

    write_some(items)
