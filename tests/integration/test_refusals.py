"""Statements that Postgres refuses: a refusal is no outage, and the connection is kept."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString

import psycopg
import pytest
import redis
from structlog.testing import capture_logs

from outbox import Handler, Task
from outbox.row import Status
from outbox.runtime import postgres
from outbox.runtime.settings import WorkerSettings
from outbox.runtime.stop import Stop
from outbox_worker.claim import claim, claim_free
from outbox_worker.complete import Completer
from outbox_worker.in_flight import InFlight
from outbox_worker.outcome import Outcome
from outbox_worker.worker import Worker
from tests.conftest import Connection
from tests.support.rows import add_row, read_row
from tests.support.tasks import Nothing
from tests.support.waiting import eventually

CASES: list[tuple[LiteralString, bool]] = [
    ("08006", True),
    ("25006", True),
    ("57P01", True),
    ("57P03", True),
    ("40001", False),
    ("40P01", False),
    ("53100", False),
    ("53200", False),
    ("55P03", False),
    ("57014", False),
    ("58030", False),
    ("23505", False),
    ("P0001", False),
    ("42501", False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_an_outage_is_told_from_a_refusal(connection: Connection, case: tuple[LiteralString, bool]) -> None:
    """By the state of the error, as the server raises it."""
    state, is_outage = case
    with pytest.raises(psycopg.Error) as caught:
        connection.execute(f"DO $$ BEGIN RAISE 'of the test' USING ERRCODE = '{state}'; END $$")
    assert caught.value.sqlstate == state
    assert postgres.is_outage(caught.value) is is_outage


ENDS: list[LiteralString] = [
    "SET idle_in_transaction_session_timeout = '10ms'; BEGIN; SELECT 1",
    "SELECT pg_terminate_backend(pg_backend_pid())",
]


@pytest.mark.parametrize("ending", ENDS)
def test_an_error_that_ends_the_session_is_an_outage(connection: Connection, ending: LiteralString) -> None:
    """Whatever its class: the connection is lost."""

    def end() -> None:
        connection.execute(ending)
        eventually(lambda: postgres.has_heard(connection), 5, "the session has ended")
        connection.execute("SELECT 1")

    with pytest.raises(psycopg.Error) as caught:
        end()
    assert postgres.is_outage(caught.value)


@pytest.fixture
def lines(worker_settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The log lines of a worker that runs in a thread until the test ends, with the time limits of its role."""
    settings = worker_settings.model_copy(update={"transaction_pooling": True})  # else the worker sets its own limits
    worker = Worker(settings, {"noted": Handler(Task("noted", Nothing), lambda *_: None)}, Stop())
    with capture_logs() as lines, ThreadPoolExecutor(1) as thread:
        ended = thread.submit(worker.run)
        try:
            yield lines
        finally:
            worker._stop.request()
            ended.result(20)


LIMITS: list[LiteralString] = ["'0'", "'300ms'"]
"""Values of `statement_timeout` that an owner may set: no limit, or less than a claim waits for a lock."""


@pytest.mark.parametrize("limit", LIMITS)
def test_a_locked_row_does_not_delay_free_rows(
    limit: LiteralString, connection: Connection, redis_client: redis.Redis, request: pytest.FixtureRequest
) -> None:
    """Rows taken with it are done at once, the locked row later; this is no outage of Postgres."""
    name = psycopg.sql.Identifier(connection.info.dbname)
    connection.execute(psycopg.sql.SQL("ALTER DATABASE {} SET statement_timeout = " + limit).format(name))
    lines: list[Any] = request.getfixturevalue("lines")
    deliveries = [add_row(connection) for _ in range(20)]
    locked, *free = deliveries
    with connection.transaction():
        connection.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", [locked.row_id])
        redis_client.rpush("rq:queue:default", *[delivery.job_id for delivery in deliveries])

        def are_done() -> bool:
            left = [row for row in free if read_row(connection, row)["status"] != "done"]
            # As the sweep does: on a busy machine a single row may exceed the limit.
            if left:
                redis_client.rpush("rq:queue:default", *[row.job_id for row in left])
            return not left

        eventually(are_done, 10, "the free rows")
        assert read_row(connection, locked)["status"] == "enqueued", "it is left to the sweep"
    redis_client.rpush("rq:queue:default", locked.job_id)  # as the next hand-over does
    eventually(lambda: read_row(connection, locked)["status"] == "done", 5)
    events = [line["event"] for line in lines]
    assert "Postgres is away" not in events
    assert ("claim timed out waiting for a row lock" if limit == "'0'" else "claim refused") in events
    assert {row["attempts"] for row in connection.execute("SELECT attempts FROM outbox")} == {1}


def test_a_claim_limits_its_own_wait(connection: Connection, database_url: str) -> None:
    """Behind a pooler the session has the limit of its role. The claim changes no setting of the session."""
    delivery = add_row(connection)
    with postgres.connect(database_url, "test", pooled=True) as claiming, connection.transaction():
        claiming.execute("SET lock_timeout = '60s'")
        connection.execute("SELECT FROM outbox FOR UPDATE")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            claim(claiming, [delivery], "me", 15)
        assert claiming.execute("SHOW lock_timeout").fetchone() == {"lock_timeout": "1min"}
        assert claim_free(claiming, [delivery], "me", 15) == ([], [])


CANCELLED = """
CREATE FUNCTION cancel() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT count(*) FROM changed) > 3 THEN RAISE 'took too long' USING ERRCODE = 'query_canceled'; END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER cancelling AFTER UPDATE ON outbox REFERENCING NEW TABLE AS changed
FOR EACH STATEMENT EXECUTE FUNCTION cancel();
"""
"""Stands for a `statement_timeout` that a statement for more than three rows exceeds."""


def test_outcomes_that_are_cancelled_are_written_in_smaller_batches(connection: Connection, database_url: str) -> None:
    """On the same connection; leases are renewed in smaller batches too."""
    completer = Completer(database_url, InFlight(), "me", 1)
    deliveries = [add_row(connection) for _ in range(20)]
    claims = claim(connection, deliveries, "me", 1)
    completer.in_flight.hold(claims)
    connection.execute(CANCELLED)
    with capture_logs() as lines:
        completer.start()
        eventually(lambda: all(read_row(connection, one)["lease"] > 0.5 for one in deliveries), 5, "leases are renewed")
        for one in claims:
            completer.in_flight.put(Outcome(one.delivery, Status.DONE, 1))
        eventually(lambda: not completer.in_flight.deliveries(), 10, "all are written")
        eventually(lambda: completer.is_healthy(0), 5)
    assert completer.close(5) == []
    assert lines == []


def test_large_payloads_are_claimed_in_several_batches(
    connection: Connection,
    redis_client: redis.Redis,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that were taken together and exceed the bytes of one claim are all done, without another hand-over."""
    monkeypatch.setattr("outbox_worker.claim.MAX_BYTES", 1000)
    deliveries = [add_row(connection, payload=f'{{"text": "{"x" * 600}"}}') for _ in range(40)]
    redis_client.rpush("rq:queue:default", *[delivery.job_id for delivery in deliveries])
    lines: list[Any] = request.getfixturevalue("lines")
    eventually(lambda: all(read_row(connection, delivery)["status"] == "done" for delivery in deliveries), 10)
    assert {row["attempts"] for row in connection.execute("SELECT attempts FROM outbox")} == {1}
    assert not [line for line in lines if line["event"] in {"dropped job", "claim refused"}]
