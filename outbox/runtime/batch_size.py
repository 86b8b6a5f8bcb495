"""How many rows one statement takes."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from outbox.runtime.postgres import NoAnswerError

SUCCESSES = 16
"""Statements that were not cut after one that was, until twice as many rows are tried."""


class BatchSize:
    """Rows per statement: half as many after one that took too long, and twice as many after some that did not.

    A statement that was cut because of all that it had to do would be cut again. What failed for another reason, such
    as a lost connection, says nothing about the size.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.rows = most
        self._successes = SUCCESSES
        """Statements of full size in a row that were not cut."""

    @contextmanager
    def trial(self, wanted: int | None = None) -> Iterator[int]:
        """Yields how many rows the statement in the block may take, and learns from how it ends.

        Args:
            wanted: how many rows there are, where that is known.
        """
        rows = self.rows if wanted is None else min(wanted, self.rows)
        try:
            yield rows
        except (psycopg.errors.QueryCanceled, NoAnswerError):
            self.rows, self._successes = max(1, rows // 2), 0
            raise
        if rows == self.rows < self._most:
            self._successes += 1
            if self._successes >= SUCCESSES:
                self.rows = min(self._most, 2 * self.rows)
