"""Batches of rows of which Postgres may refuse some: made smaller until the row that is the reason is found."""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

import psycopg

from outbox.runtime import logs, postgres
from outbox.runtime.batch_size import BatchSize
from outbox.runtime.postgres import Connection
from outbox.runtime.redaction import one_line

T = TypeVar("T")
K = TypeVar("K", int, str)
"""What names a row: its id, or a user's name."""

MAX_LEFT_OUT = 1000
"""Rows that are left out at a time, at most: where there are more, it is hardly the rows' fault."""

_NO_ROWS_FAULT = ("42501", "53", "58")
"""How the states begin of errors that smaller batches do not help against: no right, no room, the system's errors."""


class LeftOut(Generic[K]):
    """Rows that Postgres has refused by themselves. A duty leaves them out for a while, and does it for the others.

    A trigger may raise for them, a foreign key may hold them, or each try may meet a lock.
    """

    def __init__(self, event: str, seconds: float, *, field: str = "rows") -> None:
        """Takes the log event that names the rows in a field, at most once in the time that they are left out."""
        self._event = event
        self._field = field
        self._seconds = seconds
        self._until: dict[K, float] = {}
        self._tell_at = 0.0

    def rows(self) -> list[K]:
        """Returns the ids of the rows that are left out now."""
        now = time.monotonic()
        self._until = {row: until for row, until in self._until.items() if now < until}
        return sorted(self._until)

    def add(self, rows: list[K], error: Exception) -> None:
        """Leaves out rows from now on."""
        now = time.monotonic()
        self._until |= dict.fromkeys(rows, now + self._seconds)
        if now >= self._tell_at:
            logs.get().error(self._event, **{self._field: sorted(rows)}, error=one_line(error))
            self._tell_at = now + self._seconds


class Batches(Generic[K]):
    """One duty's batches: after a refusal half as large, and at last without the row that is refused alone."""

    def __init__(self, most: int, event: str, seconds: float, *, field: str = "rows") -> None:
        """Takes the rows of a batch, and what `LeftOut` takes."""
        self._size = BatchSize(most)
        self.left_out: LeftOut[K] = LeftOut(event, seconds, field=field)
        self.tried: list[K] = []
        """The rows of the batch that is being written, once they are known."""

    def write(self, connection: Connection, write: Callable[[int], T]) -> T | None:
        """Writes one batch.

        Args:
            connection: on which that is done.
            write: writes so many rows at most; all or none. It puts their ids into `tried` if it knows them, as it must
                where it may take only one.

        Returns:
            What `write` has returned, or None after a refusal: the next batch is another.

        Raises:
            psycopg.Error: Postgres is away, or refuses for what is no row's fault.
        """
        self.tried = []
        try:
            with self._size.trial() as most:
                return write(most)
        except psycopg.Error as error:
            if postgres.is_outage(error) or connection.closed or (error.sqlstate or "").startswith(_NO_ROWS_FAULT):
                raise
            if isinstance(error, psycopg.errors.LockNotAvailable) and not self.tried:
                raise  # a lock of the whole table: single rows are passed over
            tried = len(self.tried) or most
            self._size.rows = max(1, tried // 2)
            if tried == 1:
                if not self.tried or len(self.left_out.rows()) >= MAX_LEFT_OUT:
                    raise
                self.left_out.add(self.tried, error)
            return None
