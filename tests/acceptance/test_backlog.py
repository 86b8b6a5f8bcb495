"""A long backlog of one queue does not delay the other queue."""

from statistics import median

import pytest

import outbox
from outbox.queries import query
from tests.conftest import Connection
from tests.support.processes import Stack
from tests.support.tasks import RETURN
from tests.support.waiting import eventually

pytestmark = pytest.mark.unmeasured

BACKLOG = 100_000
LIMIT = 1.0
"""Seconds from the commit of a critical row until it is done."""


def test_critical_rows_behind_a_backlog(stack: Stack, connection: Connection) -> None:
    """While one relay and one worker process 100,000 rows of `default`, a critical row is done within a second."""
    connection.execute(
        "INSERT INTO outbox (task, payload) SELECT %s, '{}' FROM generate_series(1, %s)", [RETURN.name, BACKLOG]
    )
    stack.run_all("relay", "worker", OUTBOX_HANDLERS="tests.support.tasks")
    eventually(lambda: count(connection, "done") > 0, 10, "the backlog is being processed")

    waits = [handled_after(connection) for _ in range(5)]

    assert count(connection, "pending") > 1000, "there was a backlog all the time"
    # The median, because other tests run at the same time, some of them heavy.
    assert median(waits) < LIMIT, waits


def handled_after(connection: Connection) -> float:
    """Adds a critical row, sends the service's hint, and returns the seconds until the row was done."""
    with connection.transaction():
        added = outbox.add(connection, RETURN, {}, queue="critical")
    assert added
    connection.execute(query("notify_relays"))
    done = eventually(
        lambda: connection.execute(
            "SELECT extract(epoch FROM done_at - created_at)::float8 AS seconds FROM outbox"
            " WHERE id = %s AND status = 'done'",
            [added],
        ).fetchone(),
        20,
        "the critical row is done",
    )
    assert done
    return float(done["seconds"])


def count(connection: Connection, status: str) -> int:
    """Returns the number of rows with a status."""
    row = connection.execute("SELECT count(*) AS rows FROM outbox WHERE status = %s", [status]).fetchone()
    assert row
    return int(row["rows"])
