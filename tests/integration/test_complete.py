"""Marking: what became of attempts, and the leases of what runs."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, LiteralString, NoReturn

import psycopg.conninfo
import psycopg.sql
import pytest
from structlog.testing import capture_logs

from outbox.devstack.embedded import EmbeddedServer
from outbox.row import Status
from outbox.runtime import postgres
from outbox_relay.rescue import SETTLING_TIME
from outbox_worker.claim import Claim, claim
from outbox_worker.complete import MAX_REFUSED, Completer
from outbox_worker.errors import ThreadEndedError
from outbox_worker.in_flight import InFlight
from outbox_worker.outcome import Outcome, unanswered
from outbox_worker.outcomes import Outcomes
from tests.conftest import Connection
from tests.support.processes import frozen, take_down
from tests.support.rows import add_row, read_row
from tests.support.waiting import eventually


@pytest.fixture
def completer(database_url: str) -> Iterator[Completer]:
    """A running completer with leases of one second."""
    opened = Completer(database_url, InFlight(), "me", 1)
    opened.start()
    yield opened
    opened.close(5)


def claimed(connection: Connection, rows: int = 1) -> list[Claim]:
    """Adds rows and claims them."""
    return claim(connection, [add_row(connection) for _ in range(rows)], "me", 1)


def test_a_batch_is_marked(connection: Connection, completer: Completer) -> None:
    """Done, pending and dead outcomes are written together, each with what belongs to it."""
    done, again, dead = (one.delivery for one in claimed(connection, 3))
    completer.in_flight.put(Outcome(done, Status.DONE, 1))
    completer.in_flight.put(Outcome(again, Status.PENDING, 1, delay=100, error="try later"))
    completer.in_flight.put(Outcome(dead, Status.DEAD, 1, error="never"))
    eventually(lambda: read_row(connection, dead)["status"] == "dead")
    assert (read_row(connection, done)["status"], read_row(connection, done)["last_error"]) == ("done", None)
    assert read_row(connection, done)["done_at"]
    row = read_row(connection, again)
    assert (row["status"], row["last_error"], row["attempts"]) == ("pending", "try later", 1)
    assert 95 < row["waits"] <= 100, "the delay counts from Postgres' now"
    assert read_row(connection, dead)["last_error"] == "never"
    assert all(read_row(connection, one)["lease"] is None for one in (done, again, dead))


def test_many_outcomes_are_few_statements(connection: Connection, completer: Completer) -> None:
    """More outcomes than fit a batch are all written."""
    claims = claimed(connection, 1200)
    for one in claims:
        completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
    eventually(lambda: not connection.execute("SELECT FROM outbox WHERE status <> 'done'").fetchall())


@pytest.mark.parametrize("case", ["handed over again", "rescued", "claimed anew", "restored"])
def test_a_late_outcome_writes_nothing(connection: Connection, completer: Completer, case: str) -> None:
    """The fence: what belongs to somebody else by now is left alone, and the loser says so."""
    (one,) = claimed(connection)
    statements: dict[str, LiteralString] = {
        "handed over again": "UPDATE outbox SET status = 'enqueued', delivery = 2, lease_until = NULL",
        "rescued": "UPDATE outbox SET status = 'pending', lease_until = NULL",
        "claimed anew": "UPDATE outbox SET delivery = 2, worker = 'another', attempts = 2",
        "restored": "UPDATE outbox SET worker = 'another'",  # the ids and deliveries of another row have come again
    }
    connection.execute(statements[case])
    before = read_row(connection, one.delivery)
    other = claimed(connection)[0].delivery
    with capture_logs() as lines:
        completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
        completer.in_flight.put(Outcome(other, Status.DONE, 1))
        eventually(lambda: read_row(connection, other)["status"] == "done")
        eventually(lambda: lines)
    after = read_row(connection, one.delivery)
    compared = ("status", "delivery", "worker", "attempts", "last_error", "run_at", "lease_until")
    assert [after[name] for name in compared] == [before[name] for name in compared]
    assert [(line["event"], line["row"]) for line in lines] == [("dropped outcome", one.delivery.row_id)]


def test_a_row_that_somebody_has_locked_holds_up_no_other(
    connection: Connection, database_url: str, completer: Completer
) -> None:
    """The others are marked and keep their leases meanwhile; its own outcome waits, is told of once, and is written."""
    locked, done, running = claimed(connection, 3)
    completer.in_flight.hold([locked, done, running])
    with capture_logs() as lines, postgres.connect(database_url, "test") as stranger:
        with stranger.transaction():
            stranger.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", [locked.delivery.row_id])
            completer.in_flight.put(Outcome(locked.delivery, Status.DONE, 1))
            completer.in_flight.put(Outcome(done.delivery, Status.DONE, 1))
            eventually(lambda: read_row(connection, done.delivery)["status"] == "done", 2)
            lease = read_row(connection, running.delivery)["lease_until"]
            eventually(lambda: read_row(connection, running.delivery)["lease_until"] > lease, 2, "it is renewed")
            eventually(lambda: [line for line in lines if line["event"] == "outcomes wait for a lock"], 5)
            assert completer.is_healthy(0)
            assert locked.delivery in completer.in_flight.deliveries()
        eventually(lambda: read_row(connection, locked.delivery)["status"] == "done", 2)
        with stranger.transaction():
            stranger.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", [running.delivery.row_id])
            completer.in_flight.put(Outcome(running.delivery, Status.DONE, 1))
            eventually(lambda: len(lines) == 2, 5, "another lock is told of anew")
    assert [line["event"] for line in lines] == ["outcomes wait for a lock"] * 2
    assert [line["rows"] for line in lines] == [[locked.delivery.row_id], [running.delivery.row_id]]


def test_a_locked_row_is_tried_again_however_busy_the_worker_is(
    connection: Connection, database_url: str, completer: Completer
) -> None:
    """Outcomes of others that come all the time do not put it off."""
    locked, *others = claimed(connection, 100)
    completer.in_flight.hold([locked, *others])
    with postgres.connect(database_url, "test") as stranger, stranger.transaction():
        stranger.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", [locked.delivery.row_id])
        completer.in_flight.put(Outcome(locked.delivery, Status.DONE, 1))
        eventually(lambda: completer._outcomes._locked, 5, "it has met the lock")

    def one_more() -> bool:
        completer.in_flight.put(Outcome(others.pop().delivery, Status.DONE, 1))
        return bool(read_row(connection, locked.delivery)["status"] == "done")

    eventually(one_more, 3, "it is written in between")
    assert others


def test_a_lease_that_was_locked_is_renewed_at_once(connection: Connection, database_url: str) -> None:
    """Not after a third of the lease: the rescue waits for two seconds once the row is free."""
    completer = Completer(database_url, InFlight(), "me", 15)
    (one,) = claimed(connection)
    with postgres.connect(database_url, "test") as stranger, stranger.transaction():
        stranger.execute("SELECT FROM outbox FOR UPDATE")
        completer.in_flight.hold([one])
        completer.start()
        eventually(lambda: completer._leases._missed, 5, "it has met the lock")
    eventually(lambda: read_row(connection, one.delivery)["lease"] > 10, SETTLING_TIME, "it is renewed")
    completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
    assert completer.close(5) == []


def test_refused_marks_are_one_outage(connection: Connection, database_url: str, completer: Completer) -> None:
    """Of a Postgres that takes no writes, a completer that has nothing to renew speaks once, and backs off."""
    (one,) = claimed(connection)
    assert completer.is_healthy(10), "its session is there to be ended"
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


def test_a_reference_to_a_row_holds_up_nothing(connection: Connection, database_url: str, completer: Completer) -> None:
    """The lock that a foreign key takes lets the row be claimed, renewed and marked."""
    delivery = add_row(connection)
    with postgres.connect(database_url, "test") as stranger, stranger.transaction():
        stranger.execute("SELECT FROM outbox FOR KEY SHARE")
        connection.execute("SET lock_timeout = '2s'")
        completer.in_flight.hold(claim(connection, [delivery], "me", 1))
        lease = read_row(connection, delivery)["lease_until"]
        eventually(lambda: read_row(connection, delivery)["lease_until"] > lease, 2, "it is renewed")
        completer.in_flight.put(Outcome(delivery, Status.DONE, 1))
        eventually(lambda: read_row(connection, delivery)["status"] == "done", 2)


def test_who_gets_no_answer_is_not_healthy(own_postgres: EmbeddedServer) -> None:
    """A Postgres that hangs is noticed after a third of the lease, so that nothing more is begun, and so is its end."""
    with postgres.connect(own_postgres.url, "test") as connection:
        one = claimed(connection)
    completer = Completer(own_postgres.url, InFlight(), "me", 1.5)
    completer.start()
    completer.in_flight.hold(one)
    assert completer.is_healthy(10)
    with frozen(own_postgres):
        eventually(lambda: not completer.is_healthy(0), 3, "it waits for an answer")
    eventually(lambda: completer.is_healthy(0), 10, "it has one")
    completer.in_flight.put(Outcome(one[0].delivery, Status.DONE, 1))
    assert completer.close(10) == []


def test_every_outage_is_told_of(own_postgres: EmbeddedServer) -> None:
    """Of a worker that has nothing to mark too: the second outage is as new as the first."""
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


def test_nothing_to_write_needs_no_postgres(own_postgres: EmbeddedServer) -> None:
    """While Postgres is away, a completer without outcomes ends at once."""
    with postgres.connect(own_postgres.url, "test") as connection:
        completer = Completer(own_postgres.url, InFlight(), "me", 1)
        completer.in_flight.hold(claimed(connection))
    completer.start()
    assert completer.is_healthy(10)
    take_down(own_postgres)
    eventually(lambda: not completer.is_healthy(0), 10, "it has lost Postgres")
    started = time.monotonic()
    assert completer.close(10) == []
    assert time.monotonic() - started < 2
    own_postgres.restart()


def test_the_newest_outcome_of_a_delivery_counts(connection: Connection, database_url: str) -> None:
    """A handler that ends just after its row was given back has done its work: it is not done again."""
    completer = Completer(database_url, InFlight(), "me", 1)
    delivery = claimed(connection)[0].delivery
    completer.in_flight.put(Outcome(delivery, Status.PENDING, 0, error="given back"))
    completer.in_flight.put(Outcome(delivery, Status.DONE, 1))
    completer.start()
    assert completer.close(5) == []
    assert read_row(connection, delivery)["status"] == "done"


def test_leases_are_kept_however_long_an_attempt_takes(connection: Connection, database_url: str) -> None:
    """A lease of one second is renewed far beyond the attempt's time limit, until its outcome is written."""
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


def test_outcomes_wait_for_postgres(own_postgres: EmbeddedServer) -> None:
    """A Postgres that is killed in between loses no outcome: they are written when it is back."""
    with postgres.connect(own_postgres.url, "test") as connection:
        claims = claimed(connection, 3)
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
    """A row that another worker got while this one could not reach Postgres stays the other's, whatever is kept."""
    claims = claimed(connection, 3)
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
        eventually(lambda: not completer.in_flight.deliveries(), 10, "it has Postgres again")
        eventually(lambda: len(dropped(lines)) >= 3, 5, "it says what it has dropped")

    assert dropped(lines) == [(one.delivery.row_id, 1) for one in claims]
    assert connection.execute("SELECT * FROM outbox ORDER BY id").fetchall() == before


def dropped(lines: Sequence[Any]) -> list[tuple[int, int]]:
    """Returns row and delivery of the outcomes that were dropped."""
    return [(line["row"], line["delivery"]) for line in lines if line["event"] == "dropped outcome"]


@contextmanager
def unreachable(connection: Connection, server_url: str) -> Iterator[None]:
    """Cuts every connection to the test's database but the test's own, and lets nobody in meanwhile."""
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


def test_an_unwritable_outcome_is_no_end(connection: Connection, completer: Completer) -> None:
    """Whatever Postgres says, the completer goes on trying: without it, none of the worker's rows would end."""
    delivery = claimed(connection)[0].delivery
    connection.execute("ALTER TABLE outbox RENAME TO gone")
    with capture_logs() as lines:
        completer.in_flight.put(Outcome(delivery, Status.DONE, 1))
        eventually(lambda: [line for line in lines if line["event"] == "outcomes cannot be written"])
    connection.execute("ALTER TABLE gone RENAME TO outbox")
    eventually(lambda: read_row(connection, delivery)["status"] == "done")


def test_a_cut_connection_costs_nothing(connection: Connection, completer: Completer) -> None:
    """A terminated connection is replaced, and what was to be written is."""
    claims = claimed(connection, 2)
    completer.in_flight.put(Outcome(claims[0].delivery, Status.DONE, 1))
    eventually(lambda: read_row(connection, claims[0].delivery)["status"] == "done")
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'outbox worker outcomes'"
    )
    completer.in_flight.put(Outcome(claims[1].delivery, Status.DONE, 1))
    eventually(lambda: read_row(connection, claims[1].delivery)["status"] == "done")


def test_nothing_held_and_nothing_to_write_ends_at_once(database_url: str) -> None:
    """Closing waits for nobody, and a worker that comes back to Postgres starts its completer again."""
    completer = Completer(database_url, InFlight(), "me", 15)
    completer.start()
    completer.start()
    assert completer.is_healthy(10)
    began = time.monotonic()
    assert completer.close(30) == []
    assert time.monotonic() - began < 10


def test_it_may_be_closed_before_it_starts(database_url: str) -> None:
    """A worker that Postgres never let in has nothing to mark, and stops at once."""
    assert Completer(database_url, InFlight(), "me", 15).close(5) == []


SLOW = """
CREATE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1); RETURN NEW; END $$;
CREATE TRIGGER slow BEFORE UPDATE OF status ON outbox FOR EACH ROW EXECUTE FUNCTION be_slow();
"""
REFUSING = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$;
CREATE TRIGGER refusing BEFORE UPDATE OF status ON outbox FOR EACH ROW WHEN (NEW.id = 3) EXECUTE FUNCTION refuse();
"""


@pytest.mark.parametrize("status", [Status.DONE, Status.PENDING, Status.DEAD])
def test_a_write_that_is_repeated_knows_its_own(
    connection: Connection,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    status: Status,
) -> None:
    """Postgres took longer than its answer was waited for, and has committed: nobody has taken the row meanwhile."""
    monkeypatch.setattr("outbox_worker.complete.SHORTEST_ANSWER_LIMIT", 0.3)
    monkeypatch.setattr(
        "outbox.runtime.postgres.cancels", lambda _: False
    )  # as with an older libpq, which cannot in time
    completer = Completer(database_url, InFlight(), "me", 0.9)
    (one,) = claimed(connection)
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


@pytest.mark.parametrize("text", ["half of a pair \ud800", "NUL \0"])
def test_a_text_that_cannot_be_stored_costs_its_own_outcome_the_text(
    connection: Connection, database_url: str, text: str
) -> None:
    """A batch that it stands in is written all the same, and so is its own outcome, with another text."""
    completer = Completer(database_url, InFlight(), "me", 15)
    claims = claimed(connection, 46)
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


def test_an_outcome_that_postgres_refuses_is_told_of_and_kept(connection: Connection, database_url: str) -> None:
    """A trigger of somebody's refuses one row: the others are written, and that one once the trigger lets it."""
    completer = Completer(database_url, InFlight(), "me", 1)
    claims = claimed(connection, 5)
    completer.in_flight.hold(claims)
    connection.execute(REFUSING)
    with capture_logs() as lines:
        for one in claims:
            completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
        completer.start()
        eventually(lambda: completer.in_flight.deliveries() == {claims[2].delivery}, 5, "the others are written")
        lease = read_row(connection, claims[2].delivery)["lease_until"]
        eventually(lambda: read_row(connection, claims[2].delivery)["lease_until"] > lease, 5, "its lease is kept")
        assert completer.is_healthy(0)
        connection.execute("DROP TRIGGER refusing ON outbox")
        eventually(lambda: read_row(connection, claims[2].delivery)["status"] == "done", 5, "it is written")
    assert completer.close(5) == []
    assert [(line["event"], line["rows"]) for line in lines] == [
        ("outcomes cannot be written", [claims[2].delivery.row_id])
    ]


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError(), RecursionError()])
def test_the_marker_outlives_whatever_a_statement_raises(
    connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Short of descriptors, psycopg raises a bare OSError; short of memory, Python does: outcomes are kept."""
    completer = Completer(database_url, InFlight(), "me", 1)
    (one,) = claimed(connection)
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
    assert [line["event"] for line in lines] == ["writing outcomes failed"], "told once"


def test_a_marker_whose_thread_has_ended_says_so(
    connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not healthy, whoever waits for it hears at once, and what it held is named."""
    ended: list[bool] = []
    completer = Completer(database_url, InFlight(), "me", 1, on_failure=lambda: ended.append(True))
    (one,) = claimed(connection)
    completer.in_flight.hold([one])

    def end(_: Connection) -> NoReturn:
        raise SystemExit("the interpreter ends it")

    monkeypatch.setattr(completer, "_renew", end)
    completer.start()
    eventually(lambda: ended, 5, "its end is told")
    with pytest.raises(ThreadEndedError, match="the interpreter ends it"):
        completer.check()
    assert not completer.is_healthy(0)
    assert completer.close(5) == [one.delivery]


def test_a_lock_of_the_whole_table_is_no_outage(
    connection: Connection, database_url: str, completer: Completer
) -> None:
    """An index that is being built keeps writes out: nothing new is begun, and the completer writes first after it."""
    (one,) = claimed(connection)
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


def test_a_row_that_postgres_refuses_costs_the_others_neither_lease_nor_mark(
    connection: Connection, database_url: str
) -> None:
    """Renewals are one statement for all rows: the one that a trigger refuses is found, named once, and passed over."""
    completer = Completer(database_url, InFlight(), "me", 1)
    claims = claimed(connection, 5)
    connection.execute(REFUSING.replace("UPDATE OF status", "UPDATE"))
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


def test_a_shortage_of_memory_loses_no_outcome(
    connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It strikes once outcomes are collected: they are written all the same, and no lease is renewed for ever."""
    completer = Completer(database_url, InFlight(), "me", 1)
    claims = claimed(connection, 3)
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
    eventually(lambda: calls, 5, "it is the one that is called")
    with capture_logs() as lines:
        row = in_flight.begin()
        in_flight.end(row, Outcome(row.claim.delivery, Status.DONE, 1))
        in_flight.put(unanswered(claims[2].delivery))
        eventually(lambda: [line for line in lines if line["event"] == "writing outcomes failed"], 5)
        eventually(lambda: in_flight.deliveries() == {claims[1].delivery}, 5, "what was collected is written")
    assert read_row(connection, claims[0].delivery)["status"] == "done"
    assert in_flight.count_unended() == 1
    assert in_flight.handled == 1
    in_flight.give_back_waiting()
    assert completer.close(5) == []
    assert [line["event"] for line in lines] == ["writing outcomes failed"]


def test_the_cause_of_a_failure_outlives_a_refusal(connection: Connection, database_url: str) -> None:
    """While a trigger refuses the row, its outcome keeps its own text."""
    completer = Completer(database_url, InFlight(), "me", 1)
    claims = claimed(connection, 3)
    completer.in_flight.hold(claims)
    connection.execute(REFUSING)
    with capture_logs() as lines:
        completer.in_flight.put(Outcome(claims[2].delivery, Status.PENDING, 1, error="ValueError: the real cause"))
        completer.start()
        eventually(lambda: [line for line in lines if line["event"] == "outcomes cannot be written"], 5)
        connection.execute("DROP TRIGGER refusing ON outbox")
        eventually(lambda: read_row(connection, claims[2].delivery)["status"] == "pending", 5)
    assert completer.close(5) == []
    assert read_row(connection, claims[2].delivery)["last_error"] == "ValueError: the real cause"


def test_outcomes_that_are_all_refused_are_one_line(connection: Connection, database_url: str) -> None:
    """It is hardly the rows' fault: nothing new is begun, and outcomes are kept until they can be written."""
    completer = Completer(database_url, InFlight(), "me", 1)
    claims = claimed(connection, MAX_REFUSED + 5)
    completer.in_flight.hold(claims)
    connection.execute(REFUSING.replace("WHEN (NEW.id = 3)", ""))
    for one in claims:
        completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
    with capture_logs() as lines:
        completer.start()
        eventually(lambda: lines, 10)
        assert not completer.is_healthy(0)
        assert len(completer.in_flight.deliveries()) == len(claims)
        connection.execute("DROP TRIGGER refusing ON outbox")
        eventually(lambda: not completer.in_flight.deliveries(), 10, "all are written")
        eventually(lambda: completer.is_healthy(0), 5)
    assert completer.close(5) == []
    assert [line["event"] for line in lines] == ["outcomes cannot be written"]


AT_ONCE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM nextval('tries'); RAISE 'locked' USING ERRCODE = 'lock_not_available'; END $$;
CREATE SEQUENCE tries;
CREATE TRIGGER refusing BEFORE UPDATE OF status ON outbox FOR EACH ROW EXECUTE FUNCTION refuse();
"""


def test_a_lock_that_is_refused_at_once_is_not_asked_for_in_a_loop(connection: Connection, database_url: str) -> None:
    """A trigger with NOWAIT, say: some tries a second, and not thousands."""
    completer = Completer(database_url, InFlight(), "me", 15)
    (one,) = claimed(connection)
    connection.execute(AT_ONCE)
    completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
    began = time.monotonic()
    completer.start()

    def tries() -> int:
        found = connection.execute("SELECT last_value AS tries FROM tries").fetchone()
        assert found is not None
        return int(found["tries"])

    eventually(lambda: tries() > 5, 10, "it tries again")
    assert tries() < 30 * (1 + time.monotonic() - began)
    connection.execute("DROP TRIGGER refusing ON outbox")
    assert completer.close(5) == []
