"""Outcomes that Postgres refuses to write."""

import pytest
from structlog.testing import capture_logs

from outbox.row import Status
from outbox_worker.complete import MAX_REFUSED, Completer
from outbox_worker.in_flight import InFlight
from outbox_worker.outcome import Outcome
from tests.conftest import Connection
from tests.support.claims import claim_rows
from tests.support.rows import read_row
from tests.support.triggers import allow_updates, refuse_updates
from tests.support.waiting import eventually


def test_a_missing_table_does_not_end_the_completer(connection: Connection, completer: Completer) -> None:
    """The completer tries again after any error: without it, no row of the worker would end."""
    delivery = claim_rows(connection)[0].delivery
    connection.execute("ALTER TABLE outbox RENAME TO gone")
    with capture_logs() as lines:
        completer.in_flight.put(Outcome(delivery, Status.DONE, 1))
        eventually(lambda: [line for line in lines if line["event"] == "outcomes cannot be written"])
    connection.execute("ALTER TABLE gone RENAME TO outbox")
    eventually(lambda: read_row(connection, delivery)["status"] == "done")


@pytest.mark.parametrize("text", ["half of a pair \ud800", "NUL \0"])
def test_an_error_text_that_cannot_be_stored_is_replaced(connection: Connection, database_url: str, text: str) -> None:
    """Its outcome is written with another text; the other outcomes of the batch are written unchanged."""
    completer = Completer(database_url, InFlight(), "me", 15)
    claims = claim_rows(connection, 46)
    completer.in_flight.hold(claims)
    for number, one in enumerate(claims):
        bad = number == 17
        completer.in_flight.put(
            Outcome(one.delivery, Status.PENDING if bad else Status.DONE, 1, error=text if bad else None)
        )
    completer.start()
    assert completer.close(5) == []
    assert [read_row(connection, one.delivery)["status"] for one in claims].count("done") == 45
    row = read_row(connection, claims[17].delivery)
    assert (row["status"], row["last_error"]) == ("pending", "the text of the error cannot be stored")


def test_a_refused_outcome_is_logged_and_kept(connection: Connection, database_url: str) -> None:
    """A trigger refuses one row: the other outcomes are written, and that one after the trigger is dropped."""
    completer = Completer(database_url, InFlight(), "me", 1)
    claims = claim_rows(connection, 5)
    completer.in_flight.hold(claims)
    refuse_updates(connection, row_id=claims[2].delivery.row_id, of_status=True)
    with capture_logs() as lines:
        for one in claims:
            completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
        completer.start()
        eventually(lambda: completer.in_flight.deliveries() == {claims[2].delivery}, 5, "the others are written")
        lease = read_row(connection, claims[2].delivery)["lease_until"]
        eventually(lambda: read_row(connection, claims[2].delivery)["lease_until"] > lease, 5, "its lease is kept")
        assert completer.is_healthy(0)
        allow_updates(connection)
        eventually(lambda: read_row(connection, claims[2].delivery)["status"] == "done", 5, "it is written")
    assert completer.close(5) == []
    assert [(line["event"], line["rows"]) for line in lines] == [
        ("outcomes cannot be written", [claims[2].delivery.row_id])
    ]


def test_the_cause_of_a_failure_outlives_a_refusal(connection: Connection, database_url: str) -> None:
    """While a trigger refuses the row, its outcome keeps the error of the handler."""
    completer = Completer(database_url, InFlight(), "me", 1)
    claims = claim_rows(connection, 3)
    completer.in_flight.hold(claims)
    refuse_updates(connection, row_id=claims[2].delivery.row_id, of_status=True)
    with capture_logs() as lines:
        completer.in_flight.put(Outcome(claims[2].delivery, Status.PENDING, 1, error="ValueError: the real cause"))
        completer.start()
        eventually(lambda: [line for line in lines if line["event"] == "outcomes cannot be written"], 5)
        allow_updates(connection)
        eventually(lambda: read_row(connection, claims[2].delivery)["status"] == "pending", 5)
    assert completer.close(5) == []
    assert read_row(connection, claims[2].delivery)["last_error"] == "ValueError: the real cause"


def test_outcomes_that_are_all_refused_are_one_line(connection: Connection, database_url: str) -> None:
    """They are hardly the fault of the rows: nothing new is begun, and outcomes are kept until they can be written."""
    completer = Completer(database_url, InFlight(), "me", 1)
    claims = claim_rows(connection, MAX_REFUSED + 5)
    completer.in_flight.hold(claims)
    refuse_updates(connection, of_status=True)
    for one in claims:
        completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
    with capture_logs() as lines:
        completer.start()
        eventually(lambda: lines, 10)
        assert not completer.is_healthy(0)
        assert len(completer.in_flight.deliveries()) == len(claims)
        allow_updates(connection)
        eventually(lambda: not completer.in_flight.deliveries(), 10, "all are written")
        eventually(lambda: completer.is_healthy(0), 5)
    assert completer.close(5) == []
    assert [line["event"] for line in lines] == ["outcomes cannot be written"]
