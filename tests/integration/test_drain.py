"""Two publishers of one relay hand a backlog over, within the window and without a loss."""

import socketserver
from collections.abc import Iterator
from threading import Thread

import psycopg
import pytest
import redis

from outbox.runtime.settings import RelaySettings
from outbox_relay.drain import Drain
from tests.conftest import Connection

BATCH = 50


@pytest.fixture
def settings(relay_settings: RelaySettings) -> RelaySettings:
    """Small batches in a window that holds many."""
    return relay_settings.model_copy(update={"batch": BATCH, "window": 1000 * BATCH})


@pytest.fixture
def drain(redis_client: redis.Redis, settings: RelaySettings) -> Iterator[Drain]:
    """Two publishers."""
    with Drain(redis_client, settings) as opened:
        yield opened


def add(connection: Connection, count: int) -> None:
    """Adds rows that are due."""
    connection.execute("INSERT INTO outbox (task, payload) SELECT 't', '{}' FROM generate_series(1, %s)", [count])


def enqueued(connection: Connection) -> int:
    """Returns the number of rows that are handed over."""
    return len(connection.execute("SELECT FROM outbox WHERE status = 'enqueued' AND delivery = 1").fetchall())


def test_both_hand_over_a_backlog(
    connection: Connection, redis_client: redis.Redis, drain: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row once."""
    monkeypatch.setattr("outbox_relay.drain.DRAIN_TIME", 60.0)
    rows = 20 * BATCH
    add(connection, rows)
    assert not drain.drain(connection, "default"), "nothing is left"
    assert enqueued(connection) == rows
    jobs = redis_client.lrange("rq:queue:default", 0, -1)
    assert sorted(jobs) == sorted(f"{row}-1".encode() for row in range(1, rows + 1))


def test_a_drain_ends_in_time(connection: Connection, drain: Drain, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the backlog is, the relay gets to its other duties, and then goes on."""
    monkeypatch.setattr("outbox_relay.drain.DRAIN_TIME", 1e-9)
    add(connection, 5 * BATCH)
    assert drain.drain(connection, "default")
    assert enqueued(connection) == 2 * BATCH, "one batch each"
    assert drain.drain(connection, "default")
    assert not drain.drain(connection, "default")
    assert enqueued(connection) == 5 * BATCH


def test_the_window_holds(connection: Connection, redis_client: redis.Redis, settings: RelaySettings) -> None:
    """Neither publisher sees uncommitted rows of the other, and still they do not overfill it together."""
    window = 5 * BATCH
    with Drain(redis_client, settings.model_copy(update={"window": window})) as drain:
        add(connection, 20 * BATCH)
        for _ in range(50):
            drain.drain(connection, "default")
            assert redis_client.llen("rq:queue:default") <= window
            assert enqueued(connection) <= window
    assert enqueued(connection) > window - BATCH, "less room than a batch is not worth two publishers"


def test_a_small_window_is_filled_at_once(
    connection: Connection, redis_client: redis.Redis, settings: RelaySettings
) -> None:
    """If a share is less than a batch, the room is counted again at once."""
    with Drain(redis_client, settings.model_copy(update={"window": 5 * BATCH})) as drain:
        add(connection, 20 * BATCH)
        drains = 1
        while drain.drain(connection, "default"):
            drains += 1
    assert drains > 5
    assert 4 * BATCH < enqueued(connection) <= 5 * BATCH


def test_rows_stay_pending_if_redis_takes_no_jobs(
    connection: Connection, redis_client: redis.Redis, drain: Drain
) -> None:
    """Both publishers fail, and all rows are handed over later."""
    add(connection, 4 * BATCH)
    redis_client.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(redis.RedisError):
            drain.drain(connection, "default")
        assert enqueued(connection) == 0
    finally:
        redis_client.config_set("min-replicas-to-write", 0)
    drain.drain(connection, "default")
    assert enqueued(connection) == 4 * BATCH


def test_a_connection_that_breaks_is_an_outage(connection: Connection, drain: Drain) -> None:
    """If one publisher loses Postgres, the error is raised after both have ended."""
    add(connection, BATCH)
    drain.drain(connection, "default")
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'outbox relay drains'"
        " AND datname = current_database()"
    )
    with pytest.raises(psycopg.OperationalError):
        drain.drain(connection, "default")


def test_without_a_second_connection_the_relay_goes_on_alone(
    connection: Connection, redis_client: redis.Redis, settings: RelaySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If Postgres has no connection left, that is no outage; the next try is later, because it may take seconds."""
    monkeypatch.setattr("outbox_relay.drain.DRAIN_TIME", 60.0)
    asked = []

    class Refusal(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(self.client_address)

    with socketserver.TCPServer(("127.0.0.1", 0), Refusal) as server:
        listening = Thread(target=server.serve_forever)
        listening.start()
        try:
            url = f"postgresql://127.0.0.1:{server.server_address[1]}/none"
            with Drain(redis_client, settings.model_copy(update={"database_url": url})) as drain:
                for backlog in (3 * BATCH, 6 * BATCH):
                    add(connection, 3 * BATCH)
                    assert not drain.drain(connection, "default"), "nothing is left"
                    assert enqueued(connection) == backlog
        finally:
            server.shutdown()
            listening.join()
    assert len(asked) == 1
