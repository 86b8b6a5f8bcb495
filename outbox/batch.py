"""How many rows one statement takes."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from outbox.postgres import is_outage

SUCCESSES = 16
"""Statements that were not cut after one that was, until twice as many rows are tried."""


class BatchSize:
    """Rows per statement: half as many after one that Postgres refused or did not answer, and then more again.

    A statement that was cut because of all that it had to do would be cut again, so that twice as many are tried only
    after some that were not. After another refusal they are tried after each.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.rows = most
        self._wanted = 1
        """Successes in a row after which more are tried."""
        self._successes = 0

    @contextmanager
    def trial(self, wanted: int | None = None) -> Iterator[int]:
        """Yields how many rows the statement in the block may take, and learns from how it ends.

        Args:
            wanted: how many rows there are, where that is known.
        """
        rows = self.rows if wanted is None else min(wanted, self.rows)
        try:
            yield rows
        except psycopg.Error as error:
            self.rows = max(1, rows // 2)
            is_cut = isinstance(error, psycopg.errors.QueryCanceled) or is_outage(error)
            self._wanted, self._successes = SUCCESSES if is_cut else 1, 0
            raise
        self._successes += 1
        if self._successes >= self._wanted:
            self.rows, self._successes = min(self._most, 2 * self.rows), 0
