"""A Postgres that can be read and not written for a while: no row is taken from a living worker."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Thread
from typing import Any

import psycopg
import pytest
import redis
from structlog.testing import capture_logs

from outbox.devstack.embedded import EmbeddedServer
from outbox.row import Status
from outbox.runtime import postgres
from outbox.runtime.settings import RelaySettings
from outbox.runtime.stop import Stop
from outbox_relay.loop import Relay
from outbox_relay.rescue import Rescue
from outbox_worker.claim import Claim, claim
from outbox_worker.complete import Completer
from outbox_worker.in_flight import InFlight
from outbox_worker.outcome import Outcome
from tests.conftest import Connection
from tests.support.faked_clock import ClockedPostgres
from tests.support.rows import add_row, read_row
from tests.support.triggers import allow_updates, refuse_updates
from tests.support.waiting import eventually

LEASE = 1.5
HELD = 2.5 * LEASE
"""Seconds without writes, after which every lease has passed, whenever it was renewed."""


@pytest.fixture
def connection(file_postgres: EmbeddedServer) -> Iterator[Connection]:
    """A connection to it."""
    with postgres.connect(file_postgres.url, "test") as opened:
        opened.execute("DELETE FROM outbox")
        yield opened


@contextmanager
def locked(file_postgres: EmbeddedServer, mode: str) -> Iterator[None]:
    """Blocks writes as `CREATE INDEX` or `CREATE TRIGGER` does."""
    with psycopg.connect(file_postgres.url) as other:
        other.execute(f"LOCK TABLE outbox IN {mode} MODE")
        yield


@contextmanager
def read_only(file_postgres: EmbeddedServer) -> Iterator[None]:
    """Refuses all writes, also in open sessions."""
    with psycopg.connect(file_postgres.url, autocommit=True) as other:
        other.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        other.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            other.execute("ALTER SYSTEM RESET default_transaction_read_only")
            other.execute("SELECT pg_reload_conf()")


FULL = """
CREATE FUNCTION fill_the_disk() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$;
CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON outbox FOR EACH STATEMENT EXECUTE FUNCTION fill_the_disk();
"""


@contextmanager
def full_disk(file_postgres: EmbeddedServer) -> Iterator[None]:
    """Refuses writes with the error of a full disk; rows can be locked."""
    with psycopg.connect(file_postgres.url, autocommit=True) as other:
        other.execute(FULL)
        try:
            yield
        finally:
            other.execute("DROP FUNCTION fill_the_disk CASCADE")


CASES: dict[str, Callable[[EmbeddedServer], AbstractContextManager[None]]] = {
    "SHARE lock": lambda server: locked(server, "SHARE"),
    "SHARE ROW EXCLUSIVE lock": lambda server: locked(server, "SHARE ROW EXCLUSIVE"),
    "EXCLUSIVE lock": lambda server: locked(server, "EXCLUSIVE"),
    "ACCESS EXCLUSIVE lock": lambda server: locked(server, "ACCESS EXCLUSIVE"),
    "read-only": read_only,
    "full disk": full_disk,
}


@pytest.mark.parametrize("case", CASES)
def test_a_living_worker_keeps_its_row(
    case: str, file_postgres: EmbeddedServer, connection: Connection, redis_client: redis.Redis, redis_url: str
) -> None:
    """However long writes were impossible: the worker renews and completes afterwards, and the relay waits for that."""
    with run_relay_and_completer(file_postgres.url, redis_url, connection) as (mine, dead, lines):
        with CASES[case](file_postgres):
            began = time.monotonic()
            eventually(lambda: time.monotonic() - began > HELD, 20, "all leases have passed")
        eventually(lambda: rescued(lines) == [dead], 20, "the row of a worker that died is taken")
        row = read_row(connection, mine.delivery)
        assert (row["status"], row["worker"], row["delivery"], row["attempts"]) == ("running", "me", 1, 1)


@pytest.mark.parametrize("jump", [20.0, 3600.0, -3600.0])
def test_a_clock_that_jumps_takes_no_row_from_a_living_worker(
    clocked_postgres: ClockedPostgres, redis_client: redis.Redis, redis_url: str, jump: float
) -> None:
    """All leases pass at once, or none passes for an hour: only the row of the dead worker is taken."""
    with (
        postgres.connect(clocked_postgres.url, "test") as connection,
        run_relay_and_completer(clocked_postgres.url, redis_url, connection) as (mine, dead, lines),
    ):
        clocked_postgres.clock.set_ahead(jump)
        eventually(lambda: [line for line in lines if line["event"] == "Postgres' clock jumped"], 5)
        eventually(lambda: rescued(lines) == [dead], 20, "the row of a worker that died is taken")
        row = read_row(connection, mine.delivery)
        assert (row["status"], row["worker"], row["delivery"]) == ("running", "me", 1)
        clocked_postgres.clock.set_ahead(0)
        began = time.monotonic()
        eventually(lambda: time.monotonic() - began > 2 * LEASE, 10, "back again")
        assert rescued(lines) == [dead]


@contextmanager
def run_relay_and_completer(
    database_url: str, redis_url: str, connection: Connection
) -> Iterator[tuple[Claim, int, Sequence[Any]]]:
    """Runs a relay past its first wait, and a completer that holds a row.

    Yields the claim of that row, the id of a row whose worker is dead, and the log lines. At the end the completer must
    complete its row.
    """
    settings = RelaySettings(database_url=database_url, redis_url=redis_url, lease=LEASE, poll_interval=0.2)
    mine, dead = claim(connection, [add_row(connection), add_row(connection)], "me", LEASE)
    # The dead worker's lease passes only after the relay's first wait.
    lease = "UPDATE outbox SET worker = 'another', lease_until = now() + make_interval(secs => %s) WHERE id = %s"
    connection.execute(lease, [2 * LEASE, dead.delivery.row_id])
    completer = Completer(database_url, InFlight(), "me", LEASE)
    completer.in_flight.hold([mine])
    completer.start()
    stop = Stop()
    relay = Thread(target=Relay(settings, stop).run, daemon=True)
    with capture_logs() as lines:
        relay.start()
        try:
            began = time.monotonic()
            eventually(lambda: time.monotonic() - began > LEASE + 0.2, 10, "the relay's first wait")
            yield mine, dead.delivery.row_id, lines
            completer.in_flight.put(Outcome(mine.delivery, Status.DONE, 1))
            eventually(lambda: read_row(connection, mine.delivery)["status"] == "done", 10)
        finally:
            stop.request()
            relay.join(10)
            completer.close(5)
    assert rescued(lines) == [dead.delivery.row_id]


def rescued(lines: Sequence[Any]) -> list[int]:
    """Returns the ids of the rows that the relay has taken from workers."""
    return [line["row"] for line in lines if line["event"] == "rescued row"]


def test_a_jump_of_the_clock_puts_off_the_rescue(connection: Connection) -> None:
    """In either direction: all leases may have passed at once although all workers live."""
    claim(connection, [add_row(connection)], "me", -1)
    for jump in (20.0, 3600.0, -3600.0):
        rescue = Rescue(LEASE)
        now = time.time()
        rescue.note_look(now, time.monotonic(), 60)
        rescue._paused_until = 0.0  # the first wait is over
        rescue.note_look(time.time() - 5, time.monotonic() - 5, 60)
        assert rescue._paused_until == 0.0, "the clock has not jumped: one answer was late"
        rescue.note_look(time.time() + jump, time.monotonic(), 60)
        assert rescue._paused_until > time.monotonic() + LEASE - 0.5
        began = time.monotonic()
        while time.monotonic() - began < LEASE - 0.5:
            rescue.step(connection)
            time.sleep(0.1)
        assert connection.execute("SELECT status FROM outbox").fetchone() == {"status": "running"}


def test_a_lease_that_ends_in_an_hour_is_invalid(connection: Connection) -> None:
    """The clock was set back since it was written, and a living worker would have renewed it."""
    claim(connection, [add_row(connection)], "me", 3600)
    rescue = Rescue(LEASE)
    eventually(lambda: rescue.step(connection) and status(connection) == "pending", 10, "it is rescued")


def test_a_row_that_cannot_be_rescued_does_not_delay_others(connection: Connection) -> None:
    """A trigger refuses it: the row is logged, and the others are taken."""
    claims = claim(connection, [add_row(connection) for _ in range(5)], "me", -1)
    refused = claims[2].delivery.row_id
    refuse_updates(connection, row_id=refused)
    try:
        with capture_logs() as lines:
            rescue = Rescue(0)
            rescue.step(connection)
    finally:
        allow_updates(connection)
    statuses = connection.execute("SELECT id, status FROM outbox ORDER BY id").fetchall()
    assert [row["id"] for row in statuses if row["status"] == "running"] == [refused]
    assert [line["rows"] for line in lines if line["event"] == "rows cannot be rescued"] == [[refused]]
    assert sorted(line["row"] for line in lines if line["event"] == "rescued row") == sorted(
        row["id"] for row in statuses if row["status"] == "pending"
    )


def status(connection: Connection) -> str:
    """Returns the status of the only row."""
    row = connection.execute("SELECT status FROM outbox").fetchone()
    assert row is not None
    return str(row["status"])


def test_rows_that_take_long_to_write_are_rescued_in_smaller_batches(connection: Connection) -> None:
    """A trigger takes 20 ms per row: a hundred rows exceed the second that a rescue may take, so it tries fewer."""
    claim(connection, [add_row(connection) for _ in range(100)], "me", -1)
    connection.execute(
        """
        CREATE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_sleep(0.02); RETURN NEW; END $$;
        CREATE TRIGGER slow BEFORE UPDATE ON outbox FOR EACH ROW EXECUTE FUNCTION be_slow();
        """
    )
    try:
        with capture_logs() as lines:
            rescue = Rescue(0)
            eventually(lambda: rescue.step(connection) and statuses(connection) == {"pending"}, 30, "all are rescued")
    finally:
        connection.execute("DROP FUNCTION be_slow CASCADE")
    assert "rescue paused" in [line["event"] for line in lines]


def statuses(connection: Connection) -> set[str]:
    """Returns the statuses of all rows."""
    return {row["status"] for row in connection.execute("SELECT DISTINCT status FROM outbox")}
