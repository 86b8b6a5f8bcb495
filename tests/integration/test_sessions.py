"""Time limits of our sessions, so that a vanished peer does not block others for long."""

import psycopg
import pytest

from outbox.devstack.embedded import EmbeddedServer
from outbox.runtime import postgres
from outbox_worker.database import HandlerPool
from tests.conftest import Connection
from tests.support.processes import frozen


def test_a_vanished_peers_lock_ends(connection: Connection, database_url: str) -> None:
    """An idle transaction is ended with its locks, here after 0.2 s instead of 30, and the next session goes on."""
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


def test_a_wait_for_a_lock_ends(connection: Connection, database_url: str) -> None:
    """Here after 0.2 s instead of 10. The statement is tried again later."""
    connection.execute("INSERT INTO outbox (task, payload) VALUES ('t', '{}')")
    with postgres.connect(database_url, "waiting") as waiting, connection.transaction():
        assert waiting.execute("SHOW lock_timeout").fetchone() == {"lock_timeout": "10s"}
        waiting.execute("SET lock_timeout = '200ms'")
        connection.execute("SELECT FROM outbox FOR UPDATE")
        with pytest.raises(psycopg.errors.LockNotAvailable) as caught:
            waiting.execute("UPDATE outbox SET queue = 'critical'")
    assert isinstance(caught.value, postgres.AWAY)


def test_handlers_sessions_are_limited_too(database_url: str) -> None:
    """Connections that a worker lends to handlers have the same limits."""
    with HandlerPool(database_url) as pool, pool.connection() as lent:
        assert lent.execute("SHOW idle_in_transaction_session_timeout").fetchone() == ("30s",)
        assert lent.execute("SHOW lock_timeout").fetchone() == ("10s",)


def test_handlers_statements_are_limited_too(own_postgres: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A statement without an answer, here within 0.5 s instead of 20, is an outage, and its connection is closed."""
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
