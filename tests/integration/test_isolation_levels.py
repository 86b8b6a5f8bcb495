"""Databases with another default isolation level: our transactions still see what others commit."""

import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
import redis

from outbox import Context
from outbox.rq_jobs import Delivery
from outbox.runtime import postgres
from outbox.runtime.settings import RelaySettings, ServiceSettings, WorkerSettings
from outbox.signup.send_verify_email import SendVerifyEmail
from outbox_relay.publish import publish
from outbox_worker.claim import claim
from outbox_worker.database import HandlerPool
from outbox_worker.handlers.send_verify_email import verification_mail
from tests.support.api import is_problem, serve
from tests.support.links import JSON, PATH, mailed
from tests.support.session_settings import set_for_database
from tests.support.waiting import eventually

pytestmark = pytest.mark.once


@pytest.mark.parametrize("pooling", [False, True])
def test_transactions_of_relays_and_workers_see_what_others_commit(shared_url: str, *, pooling: bool) -> None:
    """They set their own isolation level, also behind a pooler."""
    with (
        set_for_database(shared_url, "default_transaction_isolation", "serializable"),
        postgres.connect(shared_url, "test", pooled=pooling) as connection,
        connection.transaction(),
    ):
        assert connection.execute("SHOW transaction_isolation").fetchone() == {
            "transaction_isolation": "read committed"
        }


@pytest.mark.parametrize("pooling", [False, True])
@pytest.mark.parametrize("isolation", ["serializable", "repeatable read"])
def test_a_link_that_is_opened_twice_at_once(
    shared_url: str, service_settings: ServiceSettings, isolation: str, *, pooling: bool
) -> None:
    """The request that waits for the other sees its change, also behind a pooler: the answer is 410, not an outage."""
    settings = service_settings.model_copy(update={"database_url": shared_url, "transaction_pooling": pooling})
    with (
        set_for_database(shared_url, "default_transaction_isolation", isolation),
        serve(settings) as api,
        postgres.connect(shared_url, "other") as other,
        ThreadPoolExecutor(1) as thread,
    ):
        other.execute("DELETE FROM users")
        link = mailed(other)
        with other.transaction():
            other.execute("UPDATE verify_emails SET is_used = true")
            waiting = thread.submit(api.client.get, PATH, params=link.query, headers=JSON)
            eventually(lambda: lock_waits(shared_url), 10, "it waits for the other")
        assert is_problem(waiting.result(10), 410)


@pytest.mark.parametrize("isolation", ["serializable", "repeatable read"])
def test_a_claim_sees_what_it_has_waited_for(
    shared_url: str, redis_client: redis.Redis, relay_settings: RelaySettings, isolation: str
) -> None:
    """A job that is taken before its relay commits is claimed after the commit, without a conflict."""
    with (
        set_for_database(shared_url, "default_transaction_isolation", isolation),
        postgres.connect(shared_url, "relay") as relaying,
        postgres.connect(shared_url, "worker") as claiming,
        ThreadPoolExecutor(1) as thread,
    ):
        relaying.execute("DELETE FROM outbox")
        (row,) = relaying.execute("INSERT INTO outbox (task, payload) VALUES ('t', '{}') RETURNING id").fetchall()
        with relaying.transaction():
            assert publish(relaying, redis_client, "default", relay_settings) == 1
            waiting = thread.submit(claim, claiming, [Delivery(row["id"], 1)], "me", 15)
            eventually(lambda: lock_waits(shared_url), 10, "the claim waits for the relay")
        assert [claimed.delivery.row_id for claimed in waiting.result(10)] == [row["id"]]


def lock_waits(url: str) -> int:
    """Returns the number of sessions of the database that wait for a lock."""
    with psycopg.connect(url) as connection:
        return connection.execute(
            "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ).rowcount


def test_serialization_conflicts_of_a_handler_are_retried(shared_url: str, worker_settings: WorkerSettings) -> None:
    """A handler's session has the database's isolation level; our statement in it is repeated after a conflict."""
    with (
        set_for_database(shared_url, "default_transaction_isolation", "serializable"),
        psycopg.connect(shared_url) as first,
        postgres.connect(shared_url, "second") as second,
        HandlerPool(shared_url) as pool,
        ThreadPoolExecutor(2) as threads,
    ):
        first.execute("DELETE FROM users")
        sent: list[object] = []
        first.execute("INSERT INTO users VALUES ('alice', 'none', 'Alice', 'alice@example.com')")
        first.execute(
            "INSERT INTO verify_emails (outbox_id, username, email, expired_at)"
            " VALUES (1, 'alice', 'alice@example.com', now())"
        )
        first.commit()
        context = Context(row_id=1, attempt=1, deadline=time.monotonic() + 60, database=pool, send=sent.append)
        first.execute("UPDATE verify_emails SET expired_at = now()")
        handle = verification_mail(worker_settings)
        opening = threads.submit(handle, SendVerifyEmail(username="alice"), context)
        eventually(lambda: lock_waits(shared_url) == 1, 10, "it waits for the first")
        with second.transaction():
            updating = threads.submit(second.execute, "UPDATE verify_emails SET expired_at = now()")
            eventually(lambda: lock_waits(shared_url) == 2, 10, "the second waits behind it")
            first.commit()
            updating.result(10)
            eventually(lambda: lock_waits(shared_url) == 1 or opening.done(), 10, "it waits for the second")
        assert opening.result(10) == {"email": "alice@example.com"}
        assert len(sent) == 1
