"""Renewing the leases of the rows that a worker holds."""

from datetime import timedelta

from structlog.testing import capture_logs

from outbox.row import Status
from outbox.runtime import postgres
from outbox_relay.rescue import SETTLING_TIME
from outbox_worker.claim import claim
from outbox_worker.complete import Completer
from outbox_worker.in_flight import InFlight
from outbox_worker.outcome import Outcome
from tests.conftest import Connection
from tests.support.claims import claim_rows
from tests.support.rows import add_row, read_row
from tests.support.triggers import refuse_updates
from tests.support.waiting import eventually


def test_the_lease_of_a_locked_row_is_renewed_soon_after_the_lock(connection: Connection, database_url: str) -> None:
    """A third of the lease would be too late: the rescue takes the row two seconds after the lock."""
    completer = Completer(database_url, InFlight(), "me", 15)
    (one,) = claim_rows(connection)
    with postgres.connect(database_url, "test") as other, other.transaction():
        other.execute("SELECT FROM outbox FOR UPDATE")
        completer.in_flight.hold([one])
        completer.start()
        eventually(lambda: completer._leases._missed, 5, "it has met the lock")
    eventually(lambda: read_row(connection, one.delivery)["lease"] > 10, SETTLING_TIME, "it is renewed")
    completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
    assert completer.close(5) == []


def test_a_lease_is_renewed_until_the_outcome_is_written(connection: Connection, database_url: str) -> None:
    """Also far beyond the attempt's time limit."""
    completer = Completer(database_url, InFlight(), "me", 1)
    completer.start()
    (overrun,) = claim(connection, [add_row(connection, timeout=1)], "me", 1)
    began = read_row(connection, overrun.delivery)["lease_until"]
    completer.in_flight.hold([overrun])
    later = began + timedelta(seconds=2.5)
    eventually(
        lambda: read_row(connection, overrun.delivery)["lease_until"] > later, 10, "it is renewed again and again"
    )
    completer.in_flight.put(Outcome(overrun.delivery, Status.DONE, 1))
    eventually(lambda: not completer.in_flight.deliveries())
    completer.close(5)


def test_a_lease_that_cannot_be_renewed_does_not_affect_others(connection: Connection, database_url: str) -> None:
    """One statement renews all leases: the row that a trigger refuses is logged once and left out."""
    completer = Completer(database_url, InFlight(), "me", 1)
    claims = claim_rows(connection, 5)
    refuse_updates(connection, row_id=claims[2].delivery.row_id)
    completer.in_flight.hold(claims)
    others = [one.delivery for one in claims if one is not claims[2]]
    later = max(read_row(connection, one)["lease_until"] for one in others) + timedelta(seconds=2)
    with capture_logs() as lines:
        completer.start()
        eventually(lambda: all(read_row(connection, one)["lease_until"] > later for one in others), 10, "renewed again")
        for one in claims[:2]:
            completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
        eventually(lambda: all(read_row(connection, one.delivery)["status"] == "done" for one in claims[:2]), 5)
        assert completer.is_healthy(0)
        completer.close(5)
    assert [(line["event"], line["rows"]) for line in lines] == [
        ("leases cannot be renewed", [claims[2].delivery.row_id])
    ]
