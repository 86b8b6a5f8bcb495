"""Writes batches of rows, and finds the rows that Postgres refuses by making the batch smaller."""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

import psycopg

from outbox.runtime import logs, postgres
from outbox.runtime.batches import BatchSize
from outbox.runtime.postgres import Connection
from outbox.runtime.redaction import one_line

T = TypeVar("T")
K = TypeVar("K", int, str)
"""The key of a row: its id, or a user's name."""

MAX_LEFT_OUT = 1000
"""Upper bound of rows that are left out at once. If there are more, the reason is hardly in the rows."""

_NOT_IN_ROWS = ("42501", "53", "58")
"""Prefixes of SQLSTATEs that a smaller batch does not avoid: a missing right, no resources, system errors."""


class LeftOut(Generic[K]):
    """Rows that Postgres has refused alone. A duty leaves them out for a while and goes on with the others.

    A trigger may raise for them, a foreign key may keep them, or another session may have locked them at each try.
    """

    def __init__(self, event: str, seconds: float, *, field: str = "rows") -> None:
        """Makes an empty set.

        Args:
            event: the log event that lists the rows, logged once per `seconds` at most.
            seconds: how long a row is left out.
            field: the event's field with the rows.
        """
        self._event = event
        self._field = field
        self._seconds = seconds
        self._until: dict[K, float] = {}
        self._log_due = 0.0

    def rows(self) -> list[K]:
        """Returns the rows that are left out now."""
        now = time.monotonic()
        self._until = {row: until for row, until in self._until.items() if now < until}
        return sorted(self._until)

    def add(self, rows: list[K], error: Exception) -> None:
        """Leaves out rows from now on."""
        now = time.monotonic()
        self._until |= dict.fromkeys(rows, now + self._seconds)
        if now >= self._log_due:
            logs.get().error(self._event, **{self._field: sorted(rows)}, error=one_line(error))
            self._log_due = now + self._seconds


class Batches(Generic[K]):
    """One duty's batches. A refused batch is halved, down to the one row that Postgres refuses, which is left out."""

    def __init__(self, size: int, event: str, seconds: float, *, field: str = "rows") -> None:
        """Makes batches of at most `size` rows; the other arguments are those of `LeftOut`."""
        self._size = BatchSize(size)
        self.left_out: LeftOut[K] = LeftOut(event, seconds, field=field)
        self.tried: list[K] = []
        """The rows of the batch that is being written, as far as they are known."""

    def write(self, connection: Connection, write: Callable[[int], T]) -> T | None:
        """Writes one batch.

        Args:
            connection: the connection that `write` uses.
            write: writes at most the given number of rows, all or none. It sets `tried` to their keys if it knows them,
                as it must if it may write only one.

        Returns:
            The result of `write`; None if the batch was refused: the next one is smaller, or leaves out a row.

        Raises:
            psycopg.Error: Postgres is away, or refuses for a reason that is not in the rows.
        """
        self.tried = []
        try:
            with self._size.trial() as size:
                return write(size)
        except psycopg.Error as error:
            if postgres.loses_connection(error, connection) or (error.sqlstate or "").startswith(_NOT_IN_ROWS):
                raise
            if isinstance(error, psycopg.errors.LockNotAvailable) and not self.tried:
                raise  # the whole table is locked: the statements skip single rows that are
            tried = len(self.tried) or size
            self._size.rows = max(1, tried // 2)
            if tried == 1:
                if not self.tried or len(self.left_out.rows()) >= MAX_LEFT_OUT:
                    raise
                self.left_out.add(self.tried, error)
            return None
