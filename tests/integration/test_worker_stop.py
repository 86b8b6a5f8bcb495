"""How a worker ends: by signals, without threads, and by errors."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import redis
from structlog.testing import capture_logs

from outbox import Handler, Task
from outbox.devstack.embedded import EmbeddedServer
from outbox.runtime import redis_connection
from outbox.runtime.settings import WorkerSettings
from outbox.runtime.stop import Stop
from outbox_worker.errors import ThreadEndedError
from outbox_worker.worker import LEAVING_TIME, Worker
from tests.conftest import Connection
from tests.support.processes import Stack, frozen
from tests.support.rows import add_row, offer, read_row
from tests.support.tasks import Nothing
from tests.support.waiting import eventually
from tests.support.workers import is_done, start_with_running_handler


def test_a_long_handler_keeps_its_row(noted_stack: Stack, connection: Connection, redis_client: redis.Redis) -> None:
    """Its lease of one second is renewed for three seconds; SIGTERM lets it end, and the exit code is 0."""
    worker, delivery, go = start_with_running_handler(noted_stack, connection, redis_client)
    later = read_row(connection, delivery)["lease_until"] + timedelta(seconds=3)
    eventually(lambda: read_row(connection, delivery)["lease_until"] > later, 10, "it is renewed again and again")
    untouched = add_row(connection)
    worker.send(signal.SIGTERM)
    go.touch()
    assert worker.wait(10) == 0
    assert is_done(connection, delivery)
    assert read_row(connection, delivery)["attempts"] == 1
    assert read_row(connection, untouched)["status"] == "enqueued"


def test_a_second_sigterm_gives_the_row_back(
    noted_stack: Stack, connection: Connection, redis_client: redis.Redis
) -> None:
    """More than a second after the first, it ends the worker at once; the row is pending, and its attempt counts.

    The row is not due before the worker has exited: its handler runs until then.
    """
    worker, delivery, _ = start_with_running_handler(noted_stack, connection, redis_client)
    worker.send(signal.SIGTERM)
    worker.send(signal.SIGTERM)
    asked_at = time.monotonic()

    def has_waited() -> bool:
        assert worker.is_up(), "two signals at once count as one"
        assert read_row(connection, delivery)["status"] == "running"
        return time.monotonic() - asked_at > 2  # the worker may have received the first signal late

    eventually(has_waited)
    asked_at = time.monotonic()
    worker.send(signal.SIGTERM)
    assert worker.wait(5) == 0
    row = read_row(connection, delivery)
    assert (row["status"], row["attempts"], row["lease"]) == ("pending", 1, None)
    assert LEAVING_TIME - (time.monotonic() - asked_at) < row["waits"] <= LEAVING_TIME
    assert row["last_error"] == "the worker was stopped before the attempt ended"


def test_a_handler_that_outlives_the_grace_does_not_delay_the_exit(
    noted_stack: Stack, connection: Connection, redis_client: redis.Redis
) -> None:
    """It has started a thread for which the interpreter's shutdown would wait."""
    worker, delivery, _ = start_with_running_handler(
        noted_stack, connection, redis_client, does="waits for a thread", OUTBOX_GRACE="0.1"
    )
    worker.send(signal.SIGTERM)
    eventually(lambda: worker.events("stopped"), 10)
    assert read_row(connection, delivery)["status"] == "pending"
    assert worker.wait(5) == 0


def test_rows_are_given_back_if_no_thread_can_be_started(
    noted_stack: Stack, connection: Connection, redis_client: redis.Redis
) -> None:
    """A limit of processes counts threads: the claimed rows have not begun, and no attempt counts."""
    worker = noted_stack.run("tests.support.threadless", THREADLESS="worker")
    eventually(lambda: redis_client.scard("rq:workers"), 20, "it takes rows, and the completer's thread runs")
    worker.send(signal.SIGUSR1)
    deliveries = [add_row(connection) for _ in range(7)]
    offer(redis_client, *(delivery.job_id for delivery in deliveries))
    assert worker.wait(10) == 1
    rows = [read_row(connection, delivery) for delivery in deliveries]
    assert {row["attempts"] for row in rows} == {0}
    assert "pending" in {row["status"] for row in rows} <= {"pending", "enqueued"}, "some may not have been taken"
    assert "no thread can be started to run handlers" in worker.text()
    assert "Traceback" not in worker.text()


def test_sigterm_works_if_no_thread_can_be_started(
    noted_stack: Stack, connection: Connection, redis_client: redis.Redis
) -> None:
    """The handler may end, its row is done, and the exit code is 0."""
    worker, delivery, go = start_with_running_handler(
        noted_stack, connection, redis_client, module="tests.support.threadless", THREADLESS="worker"
    )
    worker.send(signal.SIGUSR1)
    worker.send(signal.SIGTERM)
    go.touch()
    assert worker.wait(10) == 0
    assert is_done(connection, delivery)
    assert "Traceback" not in worker.text()


def test_a_redis_that_hangs_is_away_and_does_not_delay_the_exit(
    noted_stack: Stack, connection: Connection, own_redis: EmbeddedServer
) -> None:
    """A worker notices it within seconds. SIGTERM ends the worker in time, and the running row becomes pending."""
    delivery = add_row(connection, payload=f'{{"does": "waits", "path": "{noted_stack.folder / "begun"}"}}')
    with redis_connection.connect(own_redis.url, "test") as client:
        offer(client, delivery.job_id)
        worker = noted_stack.run("worker", REDIS_URL=own_redis.url, OUTBOX_GRACE="12")
        eventually((noted_stack.folder / "begun").exists, 10, "the handler has begun")
    with frozen(own_redis):
        worker.await_event("Redis is away", 15)
        worker.send(signal.SIGTERM)
        assert worker.wait(12 + 5) == 0, worker.text()
    assert read_row(connection, delivery)["status"] == "pending"
    assert read_row(connection, delivery)["attempts"] == 1


def test_a_worker_that_fails_lets_its_handlers_end(
    noted_stack: Stack, connection: Connection, redis_client: redis.Redis
) -> None:
    """The database lacks migrations after an outage: the worker completes its rows and signs off before it fails."""
    worker, delivery, go = start_with_running_handler(noted_stack, connection, redis_client)
    connection.execute("DELETE FROM _yoyo_migration")
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'outbox worker claims' AND datname = current_database()"
    )
    offer(redis_client, add_row(connection).job_id)  # it notices at its next claim
    eventually(lambda: worker.events("Postgres is away"), 10, "it has lost its connection")
    assert worker.is_up(), "the handler still runs"
    go.touch()
    assert worker.wait(20) == 1
    assert "run 'outbox migrate'" in worker.text()
    assert "Traceback" not in worker.text()
    assert is_done(connection, delivery)
    assert [line["cut_short"] for line in worker.events("stopped")] == [0]
    assert not redis_client.smembers("rq:workers"), "it is off RQ's list"


def test_a_worker_whose_completer_has_ended_ends(
    worker_settings: WorkerSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes nothing new and ends with an error within seconds, so that its supervisor starts another."""
    worker = Worker(worker_settings, {"noted": Handler(Task("noted", Nothing), lambda *_: None)}, Stop())
    first, second = add_row(connection), add_row(connection)

    def end(_: Connection) -> None:
        if worker._completer.in_flight.deliveries():
            raise SystemExit("no memory for it")

    monkeypatch.setattr(worker._completer, "_write", end)
    offer(worker._client, first.job_id)
    with capture_logs() as lines, ThreadPoolExecutor(1) as thread:
        running = thread.submit(worker.run)
        eventually(lambda: worker._completer._failure, 10, "the completer's thread has ended")
        ended = time.monotonic()
        offer(worker._client, second.job_id)
        with pytest.raises(ThreadEndedError, match="no memory for it"):
            running.result(20)
        assert time.monotonic() - ended < 3
    assert read_row(connection, second)["status"] == "enqueued"
    assert [line["rows"] for line in lines if line["event"] == "outcomes lost at shutdown"] == [[first.row_id]]
