"""Outcomes of rows that another session has locked."""

import time

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
from tests.support.waiting import eventually


def test_a_locked_row_does_not_delay_others(connection: Connection, database_url: str, completer: Completer) -> None:
    """The others are completed and keep their leases; its own outcome waits, is logged once, and is written later."""
    locked, done, running = claim_rows(connection, 3)
    completer.in_flight.hold([locked, done, running])
    with capture_logs() as lines, postgres.connect(database_url, "test") as other:
        with other.transaction():
            other.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", [locked.delivery.row_id])
            completer.in_flight.put(Outcome(locked.delivery, Status.DONE, 1))
            completer.in_flight.put(Outcome(done.delivery, Status.DONE, 1))
            eventually(lambda: read_row(connection, done.delivery)["status"] == "done", 2)
            lease = read_row(connection, running.delivery)["lease_until"]
            eventually(lambda: read_row(connection, running.delivery)["lease_until"] > lease, 2, "it is renewed")
            eventually(lambda: [line for line in lines if line["event"] == "outcomes wait for a lock"], 5)
            assert completer.is_healthy(0)
            assert locked.delivery in completer.in_flight.deliveries()
        eventually(lambda: read_row(connection, locked.delivery)["status"] == "done", 2)
        with other.transaction():
            other.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", [running.delivery.row_id])
            completer.in_flight.put(Outcome(running.delivery, Status.DONE, 1))
            eventually(lambda: len(lines) == 2, 5, "another lock is logged again")
    assert [line["event"] for line in lines] == ["outcomes wait for a lock"] * 2
    assert [line["rows"] for line in lines] == [[locked.delivery.row_id], [running.delivery.row_id]]


def test_a_locked_row_is_tried_again_in_a_busy_worker(
    connection: Connection, database_url: str, completer: Completer
) -> None:
    """A steady stream of other outcomes does not delay it."""
    locked, *others = claim_rows(connection, 100)
    completer.in_flight.hold([locked, *others])
    with postgres.connect(database_url, "test") as other, other.transaction():
        other.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", [locked.delivery.row_id])
        completer.in_flight.put(Outcome(locked.delivery, Status.DONE, 1))
        eventually(lambda: completer._outcomes._locked, 5, "it has met the lock")

    def one_more() -> bool:
        completer.in_flight.put(Outcome(others.pop().delivery, Status.DONE, 1))
        return bool(read_row(connection, locked.delivery)["status"] == "done")

    eventually(one_more, 3, "it is written between others")
    assert others


def test_a_foreign_key_to_a_row_does_not_delay_it(
    connection: Connection, database_url: str, completer: Completer
) -> None:
    """The lock that a foreign key takes lets the row be claimed, renewed and completed."""
    delivery = add_row(connection)
    with postgres.connect(database_url, "test") as other, other.transaction():
        other.execute("SELECT FROM outbox FOR KEY SHARE")
        connection.execute("SET lock_timeout = '2s'")
        completer.in_flight.hold(claim(connection, [delivery], "me", 1))
        lease = read_row(connection, delivery)["lease_until"]
        eventually(lambda: read_row(connection, delivery)["lease_until"] > lease, 2, "it is renewed")
        completer.in_flight.put(Outcome(delivery, Status.DONE, 1))
        eventually(lambda: read_row(connection, delivery)["status"] == "done", 2)


def test_a_lock_of_the_whole_table_is_no_outage(
    connection: Connection, database_url: str, completer: Completer
) -> None:
    """While an index is built, nothing new is begun; after it, the completer writes before the rescue."""
    (one,) = claim_rows(connection)
    completer.in_flight.hold([one])
    eventually(lambda: completer.is_healthy(0), 5)
    with capture_logs() as lines:
        with postgres.connect(database_url, "test") as other, other.transaction():
            other.execute("LOCK TABLE outbox IN SHARE MODE")
            completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
            eventually(lambda: not completer.is_healthy(0), 5, "it takes nothing new")
            eventually(lambda: lines, 5)
        eventually(lambda: read_row(connection, one.delivery)["status"] == "done", SETTLING_TIME, "before the rescue")
        eventually(lambda: completer.is_healthy(0), 5)
    assert [(line["event"], line["rows"]) for line in lines] == [("outcomes wait for a lock", "all")]


REFUSING_LOCKS = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM nextval('tries'); RAISE 'locked' USING ERRCODE = 'lock_not_available'; END $$;
CREATE SEQUENCE tries;
CREATE TRIGGER refusing BEFORE UPDATE OF status ON outbox FOR EACH ROW EXECUTE FUNCTION refuse();
"""


def test_a_lock_that_is_refused_at_once_is_tried_with_pauses(connection: Connection, database_url: str) -> None:
    """A trigger with NOWAIT for example: the completer tries some twenty times a second, not thousands."""
    completer = Completer(database_url, InFlight(), "me", 15)
    (one,) = claim_rows(connection)
    connection.execute(REFUSING_LOCKS)
    completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
    began_at = time.monotonic()
    completer.start()

    def tries() -> int:
        row = connection.execute("SELECT last_value AS tries FROM tries").fetchone()
        assert row is not None
        return int(row["tries"])

    eventually(lambda: tries() > 5, 10, "it tries again")
    assert tries() < 30 * (1 + time.monotonic() - began_at)
    connection.execute("DROP TRIGGER refusing ON outbox")
    assert completer.close(5) == []
