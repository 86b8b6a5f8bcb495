"""The relay's look: one statement that finds all there is to do, so that an idle relay runs no other."""

from typing import NamedTuple

from outbox.queries import query
from outbox.row import named
from outbox.runtime.postgres import Connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.rescue import IMPOSSIBLE_LEASE
from outbox_relay.sweep import CLOCK_ERROR


class Work(NamedTuple):
    """The row of the statement `find_work`."""

    now: float
    """Postgres' time, in seconds since the epoch."""
    pending: list[str]
    """Queues with rows to hand over."""
    enqueued: bool
    """Whether any row is `enqueued`, so that Redis should hold a job."""
    unclaimed: bool
    """Whether a row was handed over longer ago than the grace of a sweep."""
    expired: bool
    """Whether a lease has expired."""


def find_work(connection: Connection, settings: RelaySettings) -> Work:
    """Looks for work.

    Raises:
        psycopg.Error: Postgres is away, or refuses the statement.
    """
    found = (
        connection.cursor(row_factory=named(Work))
        .execute(
            query("find_work"),
            {
                "queues": list(settings.queues),
                "horizon": settings.horizon,
                "grace": settings.sweep_grace,
                "clock_error": CLOCK_ERROR,
                "impossible_lease": IMPOSSIBLE_LEASE,
            },
        )
        .fetchone()
    )
    assert found is not None
    return found
