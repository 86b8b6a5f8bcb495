"""Rescue takes rows from workers that died, and from no others."""

import math
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from outbox.queries import query
from outbox.runtime import postgres
from outbox.runtime.settings import LONGEST_LEASE
from outbox_relay.rescue import Rescue
from tests.support.waiting import eventually

Connection = psycopg.Connection[dict[str, Any]]


@pytest.fixture
def other(database_url: str) -> Iterator[Connection]:
    """A second connection: a worker's or another relay's."""
    with postgres.connect(database_url, "other") as opened:
        yield opened


def _run(connection: Connection, lease: float, attempts: int = 1, max_retries: int = 2) -> None:
    connection.execute(
        "INSERT INTO outbox (task, payload, status, delivery, attempts, max_retries, worker, lease_until)"
        " VALUES ('t', '{}', 'running', 1, %s, %s, 'w1', now() + make_interval(secs => %s))",
        [attempts, max_retries, lease],
    )


def rescue(connection: Connection) -> int:
    """Rescues in one step, and returns the number of rows."""
    before = _states(connection)
    Rescue(lease=0).step(connection)
    return sum(was == "running" != now for was, now in zip(before, _states(connection), strict=True))


def _states(connection: Connection) -> list[str]:
    return [row["status"] for row in connection.execute("SELECT status FROM outbox ORDER BY id").fetchall()]


def test_a_dead_workers_row_is_tried_again(connection: Connection) -> None:
    """Its attempt counts, the error says what happened, and the log has a line."""
    _run(connection, lease=-1)
    with capture_logs() as lines:
        assert rescue(connection) == 1
    row = connection.execute("SELECT * FROM outbox").fetchone()
    assert row is not None
    assert (row["status"], row["attempts"], row["delivery"], row["lease_until"]) == ("pending", 1, 1, None)
    assert row["last_error"] == "the worker w1 vanished: it did not renew its lease in time"
    assert [(line["event"], line["row"], line["status"]) for line in lines] == [("rescued row", row["id"], "pending")]


def test_a_row_that_kills_its_workers_dies_in_the_end(connection: Connection) -> None:
    """It is dead if all attempts are used, and pending if one is left."""
    _run(connection, lease=-1, attempts=2, max_retries=2)
    _run(connection, lease=-1, attempts=3, max_retries=2)
    _run(connection, lease=-1, attempts=1, max_retries=0)
    assert rescue(connection) == 3
    assert _states(connection) == ["pending", "dead", "dead"]


def test_a_row_that_lost_two_workers_waits(connection: Connection) -> None:
    """The first time it is offered again at once; then it waits, because it may be what kills its workers."""
    _run(connection, lease=-1, attempts=1)
    _run(connection, lease=-1, attempts=2)
    rescue(connection)
    rows = connection.execute("SELECT run_at - now() AS wait FROM outbox ORDER BY id").fetchall()
    assert rows[0]["wait"].total_seconds() <= 0
    assert 10 < rows[1]["wait"].total_seconds() < 50


@pytest.mark.parametrize("lease", [10, LONGEST_LEASE + 1])
def test_a_living_workers_row_stays(connection: Connection, lease: float) -> None:
    """A lease that has not expired is not touched, whatever the settings of worker and relay."""
    _run(connection, lease)
    assert rescue(connection) == 0
    assert _states(connection) == ["running"]


def test_a_renewal_in_the_last_moment_wins(connection: Connection, other: Connection) -> None:
    """A row that its worker is renewing or completing right now is left to it."""
    _run(connection, lease=-1)
    _run(connection, lease=-1)
    with other.transaction():
        other.execute(query("renew_leases"), {"ids": [1], "deliveries": [1], "lease": 15.0, "worker": "w1"})
        assert rescue(connection) == 1
    assert rescue(connection) == 0
    assert _states(connection) == ["running", "pending"]


def test_two_relays_rescue_a_row_once(connection: Connection, other: Connection) -> None:
    """The second skips what the first is rescuing, and finds nothing afterwards."""
    _run(connection, lease=-1)
    with connection.transaction():
        assert rescue(connection) == 1
        assert rescue(other) == 0
    assert rescue(other) == 0
    assert _states(other) == ["pending"]


def test_a_row_that_was_locked_waits_for_its_worker(connection: Connection, other: Connection) -> None:
    """A live worker could neither renew nor complete it: after the lock is released, the worker comes first."""
    _run(connection, lease=-1)
    patient = Rescue(lease=1.2)
    with other.transaction():
        other.execute("SELECT FROM outbox FOR UPDATE")
        for _ in range(3):
            assert patient.step(connection) == math.inf
    assert 0.3 <= patient.step(connection) < 0.4
    assert _states(connection) == ["running"]
    connection.execute(query("renew_leases"), {"ids": [1], "deliveries": [1], "lease": 15.0, "worker": "w1"})
    patient.forget()  # as after a look that finds no expired lease
    connection.execute("UPDATE outbox SET lease_until = now() - interval '1 s'")

    assert 0.3 <= patient.step(connection) < 0.4, "it is seen for the first time again"
    eventually(lambda: patient.step(connection) == math.inf, 5, "it is rescued")
    assert _states(connection) == ["pending"]


def test_a_late_worker_is_shut_out(connection: Connection) -> None:
    """A worker that was declared dead can write neither a renewal nor an outcome."""
    _run(connection, lease=-1)
    rescue(connection)
    late = {"ids": [1], "deliveries": [1], "worker": "w1"}
    assert connection.execute(query("renew_leases"), {**late, "lease": 15.0}).rowcount == 0
    outcome = {**late, "statuses": ["done"], "delays": [0.0], "attempts": [1], "errors": [None], "unhandled": []}
    assert connection.execute(query("complete"), outcome).fetchall() == []
    assert _states(connection) == ["pending"]
