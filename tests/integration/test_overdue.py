"""Handlers that run past their time limit and do not end."""

import threading

import pytest
from structlog.testing import capture_logs

from outbox import Context
from outbox.runtime.settings import WorkerSettings
from outbox_worker.errors import OverdueError
from outbox_worker.worker import LEAVING_TIME
from tests.conftest import Connection
from tests.support.rows import add_row, offer, read_row
from tests.support.tasks import Nothing
from tests.support.waiting import eventually
from tests.support.workers import is_done, waiting_for, worker_with, working


@pytest.fixture(autouse=True)
def short_overtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes handlers overdue half a second past their time limit."""
    monkeypatch.setattr("outbox_worker.in_flight.OVERTIME", 0.5)


def test_a_handler_that_hangs_ends_its_worker_once_the_others_have_ended(
    worker_settings: WorkerSettings, connection: Connection
) -> None:
    """A thread cannot be ended. The lease is kept until the other handlers have ended, and the attempt counts."""
    may_end, slow_has_ended = threading.Event(), threading.Event()

    def hang(_: Nothing, context: Context) -> None:
        if context.row_id == hanging.row_id:
            may_end.wait(30)
        else:
            eventually(lambda: any(line["event"] == "attempt is overdue" for line in lines))
            slow_has_ended.set()

    worker = worker_with(worker_settings, hang)
    hanging, slow = add_row(connection, task="called", timeout=1), add_row(connection, task="called", timeout=30)
    offer(worker._client, hanging.job_id, slow.job_id)
    with capture_logs() as lines, pytest.raises(OverdueError, match=f"rows {hanging.row_id} do not end"):
        worker._work()
    assert slow_has_ended.is_set(), "the worker has waited for the other handler"
    assert read_row(connection, hanging)["status"] == "running", "the lease is kept while the handler runs"
    worker._finish()
    may_end.set()
    row = read_row(connection, hanging)
    assert (row["status"], row["attempts"]) == ("pending", 1)
    assert "did not end within" in row["last_error"]
    assert row["waits"] > LEAVING_TIME + 10, "the backoff is that of a failure"
    assert is_done(connection, slow)
    assert [line["row"] for line in lines if line["event"] == "attempt is overdue"] == [hanging.row_id]


def test_a_row_whose_handler_hangs_at_every_attempt_becomes_dead(
    worker_settings: WorkerSettings, connection: Connection
) -> None:
    """Its attempts count, or it would end one worker after the other."""
    may_end = threading.Event()
    delivery = add_row(connection, task="called", timeout=1, max_retries=1)
    for attempts, status in ((1, "pending"), (2, "dead")):
        worker = worker_with(worker_settings, waiting_for(may_end))
        offer(worker._client, delivery.job_id)
        with pytest.raises(OverdueError):
            worker._work()
        worker._finish()
        row = read_row(connection, delivery)
        assert (row["status"], row["attempts"]) == (status, attempts)
        connection.execute("UPDATE outbox SET status = 'enqueued', run_at = now() WHERE status = 'pending'")
    may_end.set()


def test_a_handler_that_ends_late_costs_the_worker_nothing(
    worker_settings: WorkerSettings, connection: Connection
) -> None:
    """Its row is done. Afterwards the worker takes new rows again; it stays on RQ's list all the time."""
    may_end = threading.Event()
    worker = worker_with(worker_settings, waiting_for(may_end), concurrency=3)
    delivery, later = add_row(connection, task="called", timeout=1), add_row(connection, task="called", timeout=30)
    other = add_row(connection, task="called", timeout=30)
    offer(worker._client, delivery.job_id, other.job_id)
    with capture_logs() as lines, working(worker):
        eventually(lambda: any(line["event"] == "attempt is overdue" for line in lines), 10, "it takes nothing new")
        offer(worker._client, later.job_id)
        worker._client.delete(worker._registration.key)
        worker._registration.forget()  # as HEARTBEAT_INTERVAL later
        eventually(lambda: worker._client.exists(worker._registration.key), 5, "RQ still lists it")
        assert read_row(connection, later)["status"] == "enqueued", "nothing new is taken"
        may_end.set()
        eventually(lambda: all(is_done(connection, each) for each in (delivery, other, later)), 10, "all are done")
