"""Outcomes while Postgres is away, hangs or takes no writes, and while the worker is short of memory."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import psycopg.conninfo
import psycopg.sql
import pytest
from structlog.testing import capture_logs

from outbox.devstack.embedded import EmbeddedServer
from outbox.row import Status
from outbox.runtime import postgres
from outbox_worker.claim import claim
from outbox_worker.complete import Completer
from outbox_worker.errors import ThreadEndedError
from outbox_worker.in_flight import InFlight
from outbox_worker.outcome import Outcome, unanswered
from outbox_worker.outcomes import Outcomes
from tests.conftest import Connection
from tests.support.claims import claim_rows
from tests.support.processes import frozen, take_down
from tests.support.rows import add_row, read_row
from tests.support.waiting import eventually


def test_a_read_only_postgres_is_logged_once(connection: Connection, database_url: str, completer: Completer) -> None:
    """A completer that has no lease to renew logs the outage once, and backs off."""
    (one,) = claim_rows(connection)
    assert completer.is_healthy(10), "it has a session to be ended"
    name = psycopg.sql.Identifier(connection.info.dbname)
    read_only = psycopg.sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = {}")
    connection.execute(read_only.format(name, psycopg.sql.SQL("on")))
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'outbox worker outcomes'"
    )
    with capture_logs() as lines:
        completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
        eventually(lambda: completer._failures > 3, 10, "it has tried")
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(read_only.format(name, psycopg.sql.SQL("off")))
        eventually(lambda: read_row(connection, one.delivery)["status"] == "done", 5)
    assert [line["event"] for line in lines] == ["outcomes wait for Postgres"]


def test_a_completer_without_an_answer_is_not_healthy(own_postgres: EmbeddedServer) -> None:
    """A third of a lease after Postgres hangs, nothing new is begun, until Postgres answers again."""
    with postgres.connect(own_postgres.url, "test") as connection:
        one = claim_rows(connection)
    completer = Completer(own_postgres.url, InFlight(), "me", 1.5)
    completer.start()
    completer.in_flight.hold(one)
    assert completer.is_healthy(10)
    with frozen(own_postgres):
        eventually(lambda: not completer.is_healthy(0), 3, "it waits for an answer")
    eventually(lambda: completer.is_healthy(0), 10, "it has one")
    completer.in_flight.put(Outcome(one[0].delivery, Status.DONE, 1))
    assert completer.close(10) == []


def test_every_outage_is_logged(own_postgres: EmbeddedServer) -> None:
    """Also if the completer has no outcomes to write between two outages."""
    with postgres.connect(own_postgres.url, "test") as connection:
        completer = Completer(own_postgres.url, InFlight(), "me", 1)
        completer.in_flight.hold(claim(connection, [add_row(connection, timeout=600)], "me", 1))
    completer.start()
    with capture_logs() as lines:
        for outages in (1, 2):
            eventually(lambda: completer.is_healthy(0) and completer._failures == 0, 20, "it has renewed the lease")
            take_down(own_postgres)
            eventually(lambda: not completer.is_healthy(0), 10, "it has lost Postgres")
            own_postgres.restart()
            assert [line["event"] for line in lines] == ["outcomes wait for Postgres"] * outages
    completer.close(5)


def test_a_completer_without_outcomes_ends_without_postgres(own_postgres: EmbeddedServer) -> None:
    """It ends at once while Postgres is away."""
    with postgres.connect(own_postgres.url, "test") as connection:
        completer = Completer(own_postgres.url, InFlight(), "me", 1)
        completer.in_flight.hold(claim_rows(connection))
    completer.start()
    assert completer.is_healthy(10)
    take_down(own_postgres)
    eventually(lambda: not completer.is_healthy(0), 10, "it has lost Postgres")
    started = time.monotonic()
    assert completer.close(10) == []
    assert time.monotonic() - started < 2
    own_postgres.restart()


def test_outcomes_wait_for_postgres(own_postgres: EmbeddedServer) -> None:
    """A Postgres that is stopped loses no outcome: all are written when it is back."""
    with postgres.connect(own_postgres.url, "test") as connection:
        claims = claim_rows(connection, 3)
    completer = Completer(own_postgres.url, InFlight(), "me", 15)
    completer.start()
    completer.in_flight.hold(claims)
    take_down(own_postgres)
    for one in claims:
        completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
    assert completer.close(0.3) == [one.delivery for one in claims], "they cannot be written now"
    own_postgres.restart()
    assert completer.close(20) == []
    with postgres.connect(own_postgres.url, "test") as connection:
        assert {read_row(connection, one.delivery)["status"] for one in claims} == {"done"}


def test_outcomes_that_waited_for_postgres_may_come_too_late(
    connection: Connection, server_url: str, completer: Completer
) -> None:
    """A row that another worker has claimed during the outage is not changed, and the late outcomes are logged."""
    claims = claim_rows(connection, 3)
    completer.in_flight.hold(claims)
    assert completer.is_healthy(10)

    with capture_logs() as lines:
        with unreachable(connection, server_url):
            eventually(lambda: not completer.is_healthy(0), 10, "it has lost Postgres")
            completer.in_flight.put(Outcome(claims[0].delivery, Status.DONE, 1))
            completer.in_flight.put(Outcome(claims[1].delivery, Status.PENDING, 1, delay=100, error="late"))
            completer.in_flight.put(Outcome(claims[2].delivery, Status.DEAD, 1, error="late"))
            connection.execute(
                "UPDATE outbox SET status = 'running', delivery = 2, attempts = 2, worker = 'another',"
                " lease_until = now() + interval '1 hour'"
            )
            before = connection.execute("SELECT * FROM outbox ORDER BY id").fetchall()
        eventually(lambda: not completer.in_flight.deliveries(), 10, "it has reached Postgres again")
        eventually(lambda: len(dropped(lines)) >= 3, 5, "it has logged what it dropped")

    assert dropped(lines) == [(one.delivery.row_id, 1) for one in claims]
    assert connection.execute("SELECT * FROM outbox ORDER BY id").fetchall() == before


def dropped(lines: Sequence[Any]) -> list[tuple[int, int]]:
    """Returns row id and delivery of the outcomes that were dropped."""
    return [(line["row"], line["delivery"]) for line in lines if line["event"] == "dropped outcome"]


@contextmanager
def unreachable(connection: Connection, server_url: str) -> Iterator[None]:
    """Cuts every connection to the test's database except the test's own, and refuses new ones."""
    name = psycopg.sql.Identifier(connection.info.dbname)
    allow = psycopg.sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    with postgres.connect(server_url, "test") as elsewhere:
        elsewhere.execute(allow.format(name, psycopg.sql.SQL("false")))
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        try:
            yield
        finally:
            elsewhere.execute(allow.format(name, psycopg.sql.SQL("true")))


def test_a_cut_connection_loses_no_outcome(connection: Connection, completer: Completer) -> None:
    """A terminated connection is replaced, and the outcome is written."""
    claims = claim_rows(connection, 2)
    completer.in_flight.put(Outcome(claims[0].delivery, Status.DONE, 1))
    eventually(lambda: read_row(connection, claims[0].delivery)["status"] == "done")
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'outbox worker outcomes'"
    )
    completer.in_flight.put(Outcome(claims[1].delivery, Status.DONE, 1))
    eventually(lambda: read_row(connection, claims[1].delivery)["status"] == "done")


SLOW = """
CREATE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1); RETURN NEW; END $$;
CREATE TRIGGER slow BEFORE UPDATE OF status ON outbox FOR EACH ROW EXECUTE FUNCTION be_slow();
"""


@pytest.mark.parametrize("status", [Status.DONE, Status.PENDING, Status.DEAD])
def test_a_repeated_write_recognises_its_own_outcome(
    connection: Connection,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    status: Status,
) -> None:
    """Postgres has committed after the answer limit: the row was not taken, and no outcome is logged as dropped."""
    monkeypatch.setattr("outbox_worker.complete.SHORTEST_ANSWER_LIMIT", 0.3)
    monkeypatch.setattr(
        "outbox.runtime.postgres.cancels", lambda _: False
    )  # as with an older libpq, which cannot in time
    completer = Completer(database_url, InFlight(), "me", 0.9)
    (one,) = claim_rows(connection)
    completer.in_flight.hold([one])
    connection.execute(SLOW)
    with capture_logs() as lines:
        completer.in_flight.put(Outcome(one.delivery, status, 1, error=None if status == Status.DONE else "why"))
        completer.start()
        eventually(lambda: not completer.in_flight.deliveries(), 10, "the completer knows that it is written")
        assert completer.close(5) == []
    assert read_row(connection, one.delivery)["status"] == status
    events = [line["event"] for line in lines]
    assert "outcomes wait for Postgres" in events, "an answer was lost"
    assert "dropped outcome" not in events


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError(), RecursionError()])
def test_the_completer_survives_any_error_of_a_statement(
    connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Short of descriptors, psycopg raises a bare OSError; short of memory, Python a MemoryError: outcomes are kept."""
    completer = Completer(database_url, InFlight(), "me", 1)
    (one,) = claim_rows(connection)
    completer.in_flight.hold([one])
    fail = True
    renew = completer._leases.renew

    def failing(connection: Connection) -> bool:
        if fail:
            raise error
        return renew(connection)

    monkeypatch.setattr(completer._leases, "renew", failing)
    with capture_logs() as lines:
        completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
        completer.start()
        eventually(lambda: completer._failures > 2, 5, "it has tried")
        assert not completer.is_healthy(0)
        completer.check()
        fail = False
        eventually(lambda: read_row(connection, one.delivery)["status"] == "done", 5)
    assert completer.close(5) == []
    assert [line["event"] for line in lines] == ["writing outcomes failed"], "logged once"


def test_a_completer_whose_thread_has_ended_is_not_healthy(
    connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its callback is called at once, and `close` returns the rows that were not completed."""
    ended: list[bool] = []
    completer = Completer(database_url, InFlight(), "me", 1, on_failure=lambda: ended.append(True))
    (one,) = claim_rows(connection)
    completer.in_flight.hold([one])

    def end(_: Connection) -> NoReturn:
        raise SystemExit("the interpreter ends it")

    monkeypatch.setattr(completer, "_renew", end)
    completer.start()
    eventually(lambda: ended, 5, "the callback is called")
    with pytest.raises(ThreadEndedError, match="the interpreter ends it"):
        completer.check()
    assert not completer.is_healthy(0)
    assert completer.close(5) == [one.delivery]


def test_a_shortage_of_memory_loses_no_outcome(
    connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes after outcomes are collected: they are still written, and their leases are not renewed again."""
    completer = Completer(database_url, InFlight(), "me", 1)
    claims = claim_rows(connection, 3)
    in_flight = completer.in_flight
    in_flight.hold(claims[:2])
    in_flight.queue(claims[:2])
    add = Outcomes.add

    calls: list[int] = []

    def fail(_: Outcomes, outcomes: list[Outcome]) -> None:
        calls.append(len(outcomes))
        if outcomes:
            monkeypatch.setattr(Outcomes, "add", add)
            raise MemoryError

    completer.start()
    eventually(lambda: completer.is_healthy(0), 5)
    monkeypatch.setattr(Outcomes, "add", fail)
    eventually(lambda: calls, 5, "the failing function is in place")
    with capture_logs() as lines:
        row = in_flight.begin()
        in_flight.end(row, Outcome(row.claim.delivery, Status.DONE, 1))
        in_flight.put(unanswered(claims[2].delivery))
        eventually(lambda: [line for line in lines if line["event"] == "writing outcomes failed"], 5)
        eventually(lambda: in_flight.deliveries() == {claims[1].delivery}, 5, "the collected outcomes are written")
    assert read_row(connection, claims[0].delivery)["status"] == "done"
    assert in_flight.count_unended() == 1
    assert in_flight.handled == 1
    in_flight.give_back_waiting()
    assert completer.close(5) == []
    assert [line["event"] for line in lines] == ["writing outcomes failed"]
