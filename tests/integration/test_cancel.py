"""Statements that time out are cancelled at the server: abandoned ones would fill `max_connections`."""

import asyncio
from collections.abc import Iterator

import psycopg
import pytest
import redis

from outbox.devstack.embedded import EmbeddedServer
from outbox.row import Status
from outbox.runtime import postgres
from outbox.runtime.outage import Outage
from outbox.runtime.settings import ServiceSettings
from outbox_service.pool import create_pool
from outbox_worker.claim import claim
from outbox_worker.complete import Completer
from outbox_worker.database import HandlerPool
from outbox_worker.in_flight import InFlight
from outbox_worker.outcome import Outcome
from tests.conftest import Connection
from tests.support.processes import Stack, frozen
from tests.support.rows import add_row
from tests.support.waiting import eventually

SLEEP = "SELECT pg_sleep(600)"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits statements to two seconds instead of 20."""
    monkeypatch.setattr(postgres, "ANSWER_LIMIT", 2.0)


def sessions(connection: Connection, name: str) -> int:
    """Returns how many sessions of an application run a statement or hold a transaction."""
    row = connection.execute(
        "SELECT count(*) AS sessions FROM pg_stat_activity"
        " WHERE application_name = %s AND datname = current_database() AND state <> 'idle'",
        [name],
    ).fetchone()
    assert row is not None
    return int(row["sessions"])


@pytest.mark.usefixtures("impatient")
def test_a_process_leaves_no_statement_behind(connection: Connection, database_url: str) -> None:
    """Its connection is closed, as for any outage, and the server has ended the statement."""
    with (
        postgres.connect(database_url, "given up") as impatient,
        pytest.raises(psycopg.OperationalError, match="no answer in time"),
    ):
        impatient.execute(SLEEP)
    assert impatient.closed
    eventually(lambda: not sessions(connection, "given up"), 5)


@pytest.mark.usefixtures("impatient")
def test_a_service_leaves_no_statement_behind(connection: Connection, service_settings: ServiceSettings) -> None:
    """A connection of its pool is closed and its statement ended."""

    async def give_up() -> None:
        async with create_pool(service_settings, Outage("Postgres")) as pool:
            with pytest.raises(psycopg.OperationalError, match="no answer in time"):
                async with pool.connection() as lent:
                    await lent.execute(SLEEP)
            eventually(lambda: not sessions(connection, "outbox service"), 5)

    asyncio.run(give_up())


@pytest.mark.usefixtures("impatient")
def test_a_handler_leaves_no_statement_behind(connection: Connection, database_url: str) -> None:
    """A connection of the worker's pool is closed and its statement ended."""
    with HandlerPool(database_url) as pool:
        with pytest.raises(psycopg.OperationalError, match="no answer in time"), pool.connection() as lent:
            lent.execute(SLEEP)
        eventually(lambda: not sessions(connection, "outbox worker handlers"), 5)


@pytest.mark.usefixtures("impatient")
def test_the_request_to_cancel_times_out_too(own_postgres: EmbeddedServer) -> None:
    """The server hangs and does not answer the request."""
    with (
        postgres.connect(own_postgres.url, "given up") as impatient,
        frozen(own_postgres),
        pytest.raises(psycopg.OperationalError, match="no answer in time"),
    ):
        impatient.execute(SLEEP)
    assert impatient.closed


@pytest.fixture
def without_standby(own_postgres: EmbeddedServer) -> Iterator[Connection]:
    """Makes each commit wait for a synchronous standby that is gone; yields a connection that does not wait."""
    with postgres.connect(own_postgres.url, "test") as opened:
        opened.execute("SET synchronous_commit = local")
        opened.execute("ALTER SYSTEM SET synchronous_standby_names = 'gone'")
        opened.execute("SELECT pg_reload_conf()")
        gone = {"synchronous_standby_names": "gone"}
        eventually(lambda: opened.execute("SHOW synchronous_standby_names").fetchone() == gone, 5)
        yield opened


def test_commits_that_wait_for_a_standby_do_not_pile_up(
    own_postgres: EmbeddedServer, without_standby: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is cancelled; an outcome counts as written only once a later commit got an answer."""
    monkeypatch.setattr("outbox_worker.complete.SHORTEST_ANSWER_LIMIT", 0.5)
    completer = Completer(own_postgres.url, InFlight(), "me", 1)
    (one,) = claim(without_standby, [add_row(without_standby)], "me", 60)
    completer.in_flight.hold([one])
    completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
    completer.start()
    eventually(lambda: completer._failures > 3, 15, "it has tried several times")
    assert sessions(without_standby, "outbox worker outcomes") <= 1
    assert completer.in_flight.deliveries() == {one.delivery}
    without_standby.execute("ALTER SYSTEM RESET synchronous_standby_names")
    without_standby.execute("SELECT pg_reload_conf()")
    eventually(lambda: not completer.in_flight.deliveries(), 10, "it is written")
    assert completer.close(5) == []


def test_a_worker_that_stops_leaves_no_statement_behind(
    stack: Stack, connection: Connection, redis_client: redis.Redis
) -> None:
    """A handler's statement that still runs when the grace is over is cancelled."""
    stack.environment["OUTBOX_HANDLERS"] = "tests.support.tasks"
    stack.environment["OUTBOX_GRACE"] = "0.2"
    delivery = add_row(connection, task="sleep_in_postgres", timeout=600)
    redis_client.rpush("rq:queue:default", delivery.job_id)
    worker = stack.run("worker")
    eventually(lambda: sessions(connection, "outbox worker handlers"), 10, "the handler's statement runs")
    worker.stop()
    eventually(lambda: not sessions(connection, "outbox worker handlers"), 5)
