"""What the server may do to our sessions, so that a peer that vanished holds up nobody for long."""

import psycopg
import pytest

from outbox.devstack.embedded import EmbeddedServer
from outbox.runtime import postgres
from outbox_worker.database import HandlerPool
from tests.conftest import Connection
from tests.support.processes import frozen


def test_a_vanished_peers_lock_ends(connection: Connection, database_url: str) -> None:
    """Who idles in a transaction loses it and its locks, and the next one gets on; here after 0.2 s instead of 30."""
    connection.execute("INSERT INTO outbox (task, payload) VALUES ('t', '{}')")
    with postgres.connect(database_url, "vanished") as vanished:
        assert vanished.execute("SHOW idle_in_transaction_session_timeout").fetchone() == {
            "idle_in_transaction_session_timeout": "30s"
        }
        vanished.execute("SET idle_in_transaction_session_timeout = '200ms'")
        vanished.execute("BEGIN")
        vanished.execute("SELECT FROM outbox FOR UPDATE")
        connection.execute("UPDATE outbox SET queue = 'critical'")
        with pytest.raises(postgres.AWAY):
            vanished.execute("COMMIT")


def test_who_waits_for_a_lock_gives_up(connection: Connection, database_url: str) -> None:
    """A wait for a lock ends, here after 0.2 s instead of 10, and counts as an outage: it is tried again."""
    connection.execute("INSERT INTO outbox (task, payload) VALUES ('t', '{}')")
    with postgres.connect(database_url, "waiting") as waiting, connection.transaction():
        assert waiting.execute("SHOW lock_timeout").fetchone() == {"lock_timeout": "10s"}
        waiting.execute("SET lock_timeout = '200ms'")
        connection.execute("SELECT FROM outbox FOR UPDATE")
        with pytest.raises(psycopg.errors.LockNotAvailable) as caught:
            waiting.execute("UPDATE outbox SET queue = 'critical'")
    assert isinstance(caught.value, postgres.AWAY)


def test_handlers_sessions_are_limited_too(database_url: str) -> None:
    """The connections that a worker lends to handlers have the same limits."""
    with HandlerPool(database_url) as pool, pool.connection() as lent:
        assert lent.execute("SHOW idle_in_transaction_session_timeout").fetchone() == ("30s",)
        assert lent.execute("SHOW lock_timeout").fetchone() == ("10s",)


def test_handlers_statements_are_limited_too(own_postgres: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that gets no answer, here within 0.5 s instead of 20, ends as an outage, and its connection with it."""
    monkeypatch.setattr(postgres, "ANSWER_LIMIT", 0.5)
    with HandlerPool(own_postgres.url) as pool:
        with (
            pytest.raises(psycopg.OperationalError, match="no answer in time"),
            pool.connection() as lent,
            frozen(own_postgres),
        ):
            lent.execute("SELECT 1")
        assert lent.closed
        with pool.connection() as another:
            assert another.execute("SELECT 1").fetchone() == (1,)
