"""Defines adders, operators, and foreign sessions that lock rows."""

from random import Random

import psycopg

import outbox
from outbox.cli import dead_letters
from outbox.runtime.postgres import Connection
from tests.schedules.relays import Duty
from tests.schedules.shared_state import MAX_ROWS
from tests.support.tasks import RETURN

_LOCKS = ("FOR UPDATE", "FOR NO KEY UPDATE", "FOR SHARE", "FOR KEY SHARE")


def add(connection: Connection, draw: Random, queue: str, key: str | None) -> None:
    """Adds a row with options drawn at random."""
    outbox.add(
        connection,
        RETURN,
        {},
        queue=queue,
        delay=draw.choice([0, 0, 0, 30, 1000]),
        max_retries=draw.choice([0, 1, 1, 2, 5]),
        unique_key=key,
    )


class Adder(Duty):
    """Adds rows in transactions that commit or roll back."""

    ungated = Duty.ungated | {"add_row"}

    @property
    def is_idle(self) -> bool:
        """Whether it has added enough rows."""
        return self._added >= self.state.row_limit

    def begin(self) -> None:
        """Continues to count after a crash."""
        self._added = getattr(self, "_added", 0)

    def turn(self, connection: Connection) -> None:
        """Adds some rows in one transaction."""
        if self.is_idle:
            return
        keys = sorted(self.draw.choices(["a", "b", "c", None, None], k=self.draw.randint(1, 3)), key=str)
        with connection.transaction():
            for key in keys:
                add(connection, self.draw, self.draw.choice(self.state.queues), key)
                self._added += 1
            if self.draw.random() < 0.15:
                raise psycopg.Rollback


class Operator(Duty):
    """Retries or discards dead rows, except those of a worker that is about to exit: no person is that quick."""

    def turn(self, connection: Connection) -> None:
        """Retries or discards some rows."""
        rows = [row for row in dead_letters.ids(connection, None) if row not in self.state.leaving_rows()]
        rows = self.draw.sample(rows, self.draw.randint(0, len(rows)))
        if self.draw.random() < 0.2:
            rows += {self.draw.randint(1, MAX_ROWS)} - self.state.leaving_rows()
        if rows:
            (dead_letters.retry if self.draw.random() < 0.6 else dead_letters.discard)(connection, rows)


class Foreign(Duty):
    """Locks rows for some steps, as a dump, a report or a person at a console may."""

    def turn(self, connection: Connection) -> None:
        """Locks some rows in one transaction."""
        rows = self.draw.sample(range(1, 2 + self.state.row_limit), self.draw.randint(1, 2))
        with connection.transaction():
            connection.execute(f"SELECT FROM outbox WHERE id = ANY (%s) ORDER BY id {self.draw.choice(_LOCKS)}", [rows])
