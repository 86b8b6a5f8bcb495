"""Attempts that are put off because a user is locked or no connection is free: they do not count."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import psycopg_pool
import pytest
from structlog.testing import capture_logs

from outbox import Context, Handler, Task
from outbox.rq_jobs import Delivery
from outbox.runtime import postgres
from outbox.runtime.settings import WorkerSettings
from outbox.runtime.stop import Stop
from outbox_worker.attempt import attempt
from outbox_worker.claim import claim
from outbox_worker.database import HandlerPool
from outbox_worker.handlers import registry
from outbox_worker.outcome import Outcome
from outbox_worker.registry import Registry
from outbox_worker.worker import Worker
from tests.conftest import Connection
from tests.support.attempts import KnownContext
from tests.support.processes import add_users
from tests.support.rows import add_row
from tests.support.tasks import Nothing


@pytest.fixture
def sent() -> list[str]:
    """The addresses to which mails were sent."""
    return []


@pytest.fixture
def context(worker_settings: WorkerSettings, sent: list[str]) -> Iterator[KnownContext]:
    """The context of a handler that records mails instead of sending them."""

    def send(message: Any) -> None:
        sent.append(message.recipient)

    with HandlerPool(worker_settings.database_url) as pool:
        deadline = time.monotonic() + 60
        yield KnownContext(row_id=0, attempt=1, deadline=deadline, database=pool, send=send, settings=worker_settings)


def run_all(
    connection: Connection, context: KnownContext, handlers: Registry | None = None
) -> list[tuple[str, Outcome]]:
    """Makes one attempt at every row, 32 at a time as a worker does; returns usernames and outcomes."""
    rows = connection.execute(
        "UPDATE outbox SET status = 'enqueued', delivery = 1, lease_until = NULL, run_at = now()"
        " RETURNING id, payload ->> 'username' AS name"
    ).fetchall()
    names = {row["id"]: row["name"] for row in rows}
    claims = claim(connection, [Delivery(row_id, 1) for row_id in names], "me", 60)
    handlers = handlers or registry(context.settings)
    with ThreadPoolExecutor(32) as threads:
        outcomes = threads.map(
            lambda claimed: attempt(claimed, handlers, replace(context, row_id=claimed.delivery.row_id), 3600).outcome,
            claims,
        )
        return [(names[outcome.delivery.row_id], outcome) for outcome in outcomes]


LOCKS = {
    "for update": "SELECT FROM users WHERE username LIKE 'locked%' FOR UPDATE",
    "deleted": "DELETE FROM users WHERE username LIKE 'locked%'",
    "renamed": "UPDATE users SET username = 'x' || username WHERE username LIKE 'locked%'",
    "verifications": "SELECT FROM verify_emails WHERE username LIKE 'locked%' FOR UPDATE",
}


@pytest.mark.parametrize("lock", LOCKS)
def test_locked_users_do_not_delay_others_and_cost_no_attempt(
    connection: Connection, context: KnownContext, sent: list[str], database_url: str, lock: str
) -> None:
    """Their rows are given back after any kind of lock; the mails of other users are sent."""
    locked, others = [f"locked_{n}" for n in range(5)], [f"other_{n}" for n in range(40)]
    add_users(connection, locked + others)
    if lock == "verifications":
        connection.execute(
            "INSERT INTO verify_emails (outbox_id, username, email, expired_at)"
            " SELECT outbox.id, username, email, now() FROM outbox JOIN users ON username = payload ->> 'username'"
            " WHERE username LIKE 'locked%'"
        )
    with postgres.connect(database_url, "application") as application, application.transaction(force_rollback=True):
        application.execute(LOCKS[lock])
        tries = run_all(connection, context)
        assert sorted(sent) == sorted(f"{name}@example.com" for name in others), "while the lock is held"
    for name, outcome in tries:
        if name in others:
            assert outcome.status == "done"
        else:
            assert (outcome.status, outcome.attempts) == ("pending", 0)
            assert 0 < outcome.delay < 5
            assert "lock" in str(outcome.error)
    assert {outcome.status for _, outcome in run_all(connection, context)} == {"done"}, "once the lock is gone"
    assert len(sent) == len(others) + len(locked + others)


def test_a_lock_of_the_whole_table_costs_no_attempt(
    connection: Connection, context: KnownContext, sent: list[str], database_url: str
) -> None:
    """Neither if the wait for the lock times out, nor if it takes all of the attempt's time."""
    add_users(connection, [f"user_{n}" for n in range(9)])
    with postgres.connect(database_url, "application") as application, application.transaction():
        application.execute("LOCK TABLE users")
        tries = run_all(connection, replace(context, deadline=time.monotonic() + 1.5))
    assert {(outcome.status, outcome.attempts) for _, outcome in tries} == {("pending", 0)}
    assert not sent


@pytest.fixture
def lent(context: KnownContext) -> Iterator[None]:
    """Lends all connections of the pool to others."""
    with ExitStack() as stack:
        for _ in range(context.database.max_size):
            stack.enter_context(context.database.connection())
        yield


@pytest.mark.usefixtures("lent")
def test_a_mail_without_a_connection_is_put_off(connection: Connection, context: KnownContext, sent: list[str]) -> None:
    """All connections are lent to other handlers: the limit is the worker's own, and is logged once."""
    context.database.timeout = 0.2
    add_users(connection, [f"user_{n}" for n in range(9)])
    with capture_logs() as lines:
        tries = run_all(connection, context)
    assert {(outcome.status, outcome.attempts) for _, outcome in tries} == {("pending", 0)}
    assert not sent
    assert [(line["event"], line["size"]) for line in lines] == [("no connection for a handler", 4)]


def run_statement(_: Nothing, context: KnownContext) -> None:
    """Uses a connection of the worker's pool."""
    with context.database.connection() as lent:
        lent.execute("SELECT 1")


def fail(_: Nothing, context: KnownContext) -> None:
    """Gets no connection from a pool of the application."""
    raise psycopg_pool.PoolTimeout("mine")


@pytest.mark.usefixtures("lent")
@pytest.mark.parametrize(("handle", "attempts"), [(run_statement, 0), (fail, 1)])
def test_an_applications_handler_without_a_connection_is_put_off(
    connection: Connection, context: KnownContext, handle: Callable[[Nothing, Context], None], attempts: int
) -> None:
    """The attempt does not count; it counts if a pool of the application has no connection."""
    context.database.timeout = 0.2
    add_row(connection, task="own", payload="{}", max_retries=5)
    ((_, outcome),) = run_all(connection, context, {"own": Handler(Task("own", Nothing), handle)})
    assert (outcome.status, outcome.attempts) == ("pending", attempts)


def test_the_size_of_the_pool_is_a_setting(worker_settings: WorkerSettings) -> None:
    """The default is 4 connections."""
    assert Worker(worker_settings, {}, Stop())._database.max_size == 4
    settings = worker_settings.model_copy(update={"handler_connections": 9})
    assert Worker(settings, {}, Stop())._database.max_size == 9
