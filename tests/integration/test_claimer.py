"""Claims whose answer was lost, and jobs that Redis holds twice."""

import threading
from collections.abc import Callable
from typing import Any, NoReturn

import psycopg
import pytest
from structlog.testing import capture_logs

from outbox import Context
from outbox.runtime import postgres
from outbox.runtime.settings import WorkerSettings
from outbox_worker.claim import Claim, claim
from tests.conftest import Connection
from tests.support.rows import add_row, offer, read_row
from tests.support.tasks import Nothing
from tests.support.waiting import eventually
from tests.support.workers import is_done, worker_with, working


def test_a_row_that_redis_has_twice_runs_once(
    worker_settings: WorkerSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if rows are claimed one by one because an earlier claim got no answer."""
    ran: list[int] = []

    def count(_: Nothing, context: Context) -> None:
        ran.append(context.row_id)
        eventually(lambda: not worker._claimer.has_jobs)

    worker = worker_with(worker_settings, count)
    delivery = add_row(connection, task="called")
    worker._claimer._may_have_claimed = True
    offer(worker._client, delivery.job_id, delivery.job_id)
    with working(worker):
        eventually(lambda: is_done(connection, delivery), 10)
    assert ran == [delivery.row_id]


def lose_first_answer(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    """Makes the first claim succeed without an answer; calls `then` before the worker notices."""

    def claim_without_answer(*arguments: Any, **options: Any) -> list[Claim]:
        monkeypatch.setattr("outbox_worker.claimer.claim", claim)
        assert claim(*arguments, **options)
        then()
        raise psycopg.OperationalError("the answer is lost")

    monkeypatch.setattr("outbox_worker.claimer.claim", claim_without_answer)


def test_a_row_that_may_be_claimed_is_given_back_when_the_worker_stops(
    worker_settings: WorkerSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker stops before it can repeat the claim: the row has not begun, and no attempt counts."""
    delivery = add_row(connection, task="called", max_retries=0)
    worker = worker_with(worker_settings, lambda *_: None)
    lose_first_answer(monkeypatch, worker._stop.request)
    offer(worker._client, delivery.job_id)
    worker._work()
    worker._finish()
    row = read_row(connection, delivery)
    assert (row["status"], row["attempts"]) == ("pending", 0)


def test_a_row_that_may_be_claimed_and_is_locked_then_is_given_back(
    worker_settings: WorkerSettings, database_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another session has the row locked when the worker repeats the claim: it is given back after the lock is gone.

    The row behind it does not wait for the lock.
    """
    delivery, behind = (
        add_row(connection, task="called", max_retries=0),
        add_row(connection, task="called", max_retries=0),
    )
    worker = worker_with(worker_settings, lambda *_: None)
    with postgres.connect(database_url, "test") as other:
        locks = other.transaction()

        def lock() -> None:
            locks.__enter__()
            other.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", [delivery.row_id])

        lose_first_answer(monkeypatch, lock)
        offer(worker._client, delivery.job_id, behind.job_id)
        with capture_logs() as lines, working(worker):
            eventually(lambda: [line for line in lines if "claim" in line["event"]], 10, "it has met the lock")
            eventually(lambda: is_done(connection, behind), 10, "it does not wait for the lock")
            assert read_row(connection, delivery)["status"] == "running"
            locks.__exit__(None, None, None)
            eventually(lambda: read_row(connection, delivery)["status"] == "pending", 10, "it is given back")
        assert read_row(connection, delivery)["attempts"] == 0


def test_a_running_row_is_not_given_back_if_the_claim_of_a_copy_gets_no_answer(
    worker_settings: WorkerSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis holds the job twice: the row stays with its handler."""
    ran: list[int] = []
    may_end = threading.Event()

    def wait(_: Nothing, context: Context) -> None:
        ran.append(context.attempt)
        may_end.wait(30)

    delivery = add_row(connection, task="called", timeout=60)
    worker = worker_with(worker_settings, wait)
    offer(worker._client, delivery.job_id)
    with capture_logs() as lines, working(worker):
        eventually(lambda: ran, 10)

        def lose(*_: Any, **__: Any) -> NoReturn:
            monkeypatch.setattr("outbox_worker.claimer.claim", claim)
            raise psycopg.OperationalError("the answer is lost")

        monkeypatch.setattr("outbox_worker.claimer.claim", lose)
        offer(worker._client, delivery.job_id)
        eventually(lambda: [line for line in lines if line["event"] == "dropped job"], 10, "the copy is dropped")
        later = add_row(connection, task="unheard_of")
        offer(worker._client, later.job_id)
        eventually(lambda: read_row(connection, later)["status"] != "enqueued", 10, "outcomes are written")
        assert read_row(connection, delivery)["status"] == "running"
        may_end.set()
        eventually(lambda: is_done(connection, delivery), 10)
    assert ran == [1]
