"""Sizes of batches, and bisection of a batch that Postgres refuses."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import psycopg

from outbox.runtime.postgres import AWAY, NoAnswerError

T = TypeVar("T")

SUCCESSES = 16
"""Full batches that must succeed after a time-out before the size is doubled."""


class BatchSize:
    """Rows per statement: halved after a statement that took too long, doubled again after `SUCCESSES` that did not.

    A statement that timed out because of its size would time out again. Any other failure, such as a lost connection,
    says nothing about the size.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self.rows = maximum
        self._successes = SUCCESSES
        """Full batches that succeeded since the last time-out."""

    @contextmanager
    def trial(self, available: int | None = None) -> Iterator[int]:
        """Yields how many rows the statement in the block may take, and adapts the size to how the block ends.

        Args:
            available: the number of rows, if known.
        """
        rows = self.rows if available is None else min(available, self.rows)
        try:
            yield rows
        except (psycopg.errors.QueryCanceled, NoAnswerError):
            self.rows, self._successes = max(1, rows // 2), 0
            raise
        if rows == self.rows < self._maximum:
            self._successes += 1
            if self._successes >= SUCCESSES:
                self.rows = min(self._maximum, 2 * self.rows)


def write_bisecting(items: Sequence[T], write: Callable[[Sequence[T]], None]) -> list[tuple[T, Exception]]:
    """Writes all items in one call; if that fails, halves the batch until only the refused items are left.

    An item is refused if a text cannot be encoded, a trigger raises, or it alone exceeds the statement's time limit.

    Args:
        items: the items to write.
        write: writes some of them, all or none.

    Returns:
        The refused items, each with its error.

    Raises:
        psycopg.Error: Postgres is away, or refused for a reason that is not an item's: a lock timeout, a deadlock, a
            full disk. Items that were written stay written.
    """
    if not items:
        return []
    try:
        write(items)
    except psycopg.errors.QueryCanceled as error:  # a time limit, which all items together may have exceeded
        return _bisect(items, write, error)
    except AWAY:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, bisection finds the item that causes it
        return _bisect(items, write, error)
    return []


def _bisect(items: Sequence[T], write: Callable[[Sequence[T]], None], error: Exception) -> list[tuple[T, Exception]]:
    if len(items) == 1:
        return [(items[0], error)]
    middle = len(items) // 2
    return write_bisecting(items[:middle], write) + write_bisecting(items[middle:], write)
