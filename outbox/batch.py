"""How many rows one statement takes."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg


class BatchSize:
    """Rows per statement: half as many after one that Postgres refused or did not answer, twice after a success.

    A statement that was cut because of all that it had to do would be cut again.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.rows = most

    @contextmanager
    def trial(self, wanted: int | None = None) -> Iterator[int]:
        """Yields how many rows the statement in the block may take, and learns from how it ends.

        Args:
            wanted: how many rows there are, where that is known.
        """
        rows = self.rows if wanted is None else min(wanted, self.rows)
        try:
            yield rows
        except psycopg.Error:
            self.rows = max(1, rows // 2)
            raise
        if rows == self.rows:
            self.rows = min(self._most, 2 * rows)
