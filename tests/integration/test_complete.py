"""Completing: the outcomes of attempts are written to their rows, if the rows are still this worker's."""

import time
from typing import LiteralString

import pytest
from structlog.testing import capture_logs

from outbox.row import Status
from outbox_worker.complete import Completer
from outbox_worker.in_flight import InFlight
from outbox_worker.outcome import Outcome
from tests.conftest import Connection
from tests.support.claims import claim_rows
from tests.support.rows import read_row
from tests.support.waiting import eventually


def test_a_batch_is_written(connection: Connection, completer: Completer) -> None:
    """Done, pending and dead outcomes are written in one statement, each with its error and delay."""
    done, again, dead = (one.delivery for one in claim_rows(connection, 3))
    completer.in_flight.put(Outcome(done, Status.DONE, 1))
    completer.in_flight.put(Outcome(again, Status.PENDING, 1, delay=100, error="try later"))
    completer.in_flight.put(Outcome(dead, Status.DEAD, 1, error="never"))
    eventually(lambda: read_row(connection, dead)["status"] == "dead")
    assert (read_row(connection, done)["status"], read_row(connection, done)["last_error"]) == ("done", None)
    assert read_row(connection, done)["done_at"]
    row = read_row(connection, again)
    assert (row["status"], row["last_error"], row["attempts"]) == ("pending", "try later", 1)
    assert 95 < row["waits"] <= 100, "the delay counts from Postgres' time"
    assert read_row(connection, dead)["last_error"] == "never"
    assert all(read_row(connection, one)["lease"] is None for one in (done, again, dead))


def test_more_outcomes_than_a_batch_are_written(connection: Connection, completer: Completer) -> None:
    """They take several statements."""
    claims = claim_rows(connection, 1200)
    for one in claims:
        completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
    eventually(lambda: not connection.execute("SELECT FROM outbox WHERE status <> 'done'").fetchall())


@pytest.mark.parametrize("case", ["handed over again", "rescued", "claimed again", "restored"])
def test_a_late_outcome_writes_nothing(connection: Connection, completer: Completer, case: str) -> None:
    """The fence: a row that was taken from this worker is not changed, and the dropped outcome is logged."""
    (one,) = claim_rows(connection)
    statements: dict[str, LiteralString] = {
        "handed over again": "UPDATE outbox SET status = 'enqueued', delivery = 2, lease_until = NULL",
        "rescued": "UPDATE outbox SET status = 'pending', lease_until = NULL",
        "claimed again": "UPDATE outbox SET delivery = 2, worker = 'another', attempts = 2",
        "restored": "UPDATE outbox SET worker = 'another'",  # ids and deliveries have repeated
    }
    connection.execute(statements[case])
    before = read_row(connection, one.delivery)
    other = claim_rows(connection)[0].delivery
    with capture_logs() as lines:
        completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
        completer.in_flight.put(Outcome(other, Status.DONE, 1))
        eventually(lambda: read_row(connection, other)["status"] == "done")
        eventually(lambda: lines)
    after = read_row(connection, one.delivery)
    compared = ("status", "delivery", "worker", "attempts", "last_error", "run_at", "lease_until")
    assert [after[name] for name in compared] == [before[name] for name in compared]
    assert [(line["event"], line["row"]) for line in lines] == [("dropped outcome", one.delivery.row_id)]


def test_the_newest_outcome_of_a_delivery_counts(connection: Connection, database_url: str) -> None:
    """A handler that ends just after its row was given back has done its work, which must not be repeated."""
    completer = Completer(database_url, InFlight(), "me", 1)
    delivery = claim_rows(connection)[0].delivery
    completer.in_flight.put(Outcome(delivery, Status.PENDING, 0, error="given back"))
    completer.in_flight.put(Outcome(delivery, Status.DONE, 1))
    completer.start()
    assert completer.close(5) == []
    assert read_row(connection, delivery)["status"] == "done"


def test_a_completer_without_rows_ends_at_once(database_url: str) -> None:
    """It may have been started twice: the worker starts it at each connection to Postgres."""
    completer = Completer(database_url, InFlight(), "me", 15)
    completer.start()
    completer.start()
    assert completer.is_healthy(10)
    began_at = time.monotonic()
    assert completer.close(30) == []
    assert time.monotonic() - began_at < 10


def test_a_completer_may_be_closed_before_it_starts(database_url: str) -> None:
    """A worker that never reached Postgres has no outcomes, and stops at once."""
    assert Completer(database_url, InFlight(), "me", 15).close(5) == []
