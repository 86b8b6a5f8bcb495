"""A relay goes on through outages of Postgres and Redis, and logs one line when one begins and one when it ends."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from structlog.testing import capture_logs

from outbox.devstack.embedded import EmbeddedServer, embedded_redis
from outbox.queries import query
from outbox.runtime import postgres, redis_connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.rescue import RESCUE_INTERVAL
from tests.support.processes import frozen
from tests.support.relays import add_pending, changed, events_in, queued, running, status_of
from tests.support.waiting import eventually

Connection = psycopg.Connection[dict[str, Any]]


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    """All log lines of the test."""
    with capture_logs() as captured:
        yield captured


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A Redis that a test may stop."""
    with embedded_redis(tmp_path / "own_redis") as server:
        yield server


def _stop(server: EmbeddedServer) -> None:
    server.process.send_signal(signal.SIGINT)
    server.process.wait(20)


def test_redis_away_is_a_line_at_each_end(
    connection: Connection, relay_settings: RelaySettings, own_redis: EmbeddedServer, lines: list[Any]
) -> None:
    """Redis stops and comes back empty: one line each, the process stays up, and every row reaches a queue."""
    settings = changed(relay_settings, redis_url=own_redis.url, poll_interval=0.1, sweep_interval=0.2, sweep_grace=0.1)
    with running(settings), redis_connection.connect(own_redis.url, "test") as client:
        before = add_pending(connection)
        eventually(lambda: status_of(connection, before) == "enqueued", 10)
        _stop(own_redis)
        while_away = add_pending(connection)
        eventually(lambda: events_in(lines, "Redis is away"), 10)
        own_redis.restart()
        eventually(lambda: status_of(connection, while_away) == "enqueued", 10, "Redis is used again")
        eventually(lambda: sorted(queued(client)) == [b"1-2", b"2-1"], 10, "both rows are there")
    assert events_in(lines, "Redis is away", "Redis is back") == ["Redis is away", "Redis is back"]


@pytest.mark.parametrize("queue", ["critical", "default"])
def test_a_redis_without_memory_is_away(
    connection: Connection, relay_settings: RelaySettings, own_redis: EmbeddedServer, lines: list[Any], queue: str
) -> None:
    """A Redis that answers but takes no writes is logged as away once, not once per try."""
    settings = changed(relay_settings, redis_url=own_redis.url, poll_interval=0.05, sweep_interval=0.1)
    with redis_connection.connect(own_redis.url, "test") as client, running(settings):
        client.config_set("maxmemory", "1")
        row = add_pending(connection, queue)
        eventually(lambda: events_in(lines, "Redis is away"), 10)
        tries = client.info("stats")["total_commands_processed"]
        eventually(lambda: client.info("stats")["total_commands_processed"] > tries + 30, 10, "it tries again")
        assert events_in(lines, "Redis is back") == []
        client.config_set("maxmemory", "0")
        eventually(lambda: status_of(connection, row) == "enqueued", 10)
    assert events_in(lines, "Redis is away", "Redis is back") == ["Redis is away", "Redis is back"]


def test_a_redis_that_is_loading_is_away(
    connection: Connection, relay_settings: RelaySettings, tmp_path: Path, lines: list[Any]
) -> None:
    """While Redis loads its file, no job counts as lost.

    Afterwards what the file had is there as before, and what was handed over since it was written is handed over again.
    """
    # It waits at every key (µs), and answers clients after every 2 MB.
    slow = ["key-load-delay 80000", "rdbcompression no"]
    settings = changed(relay_settings, poll_interval=0.1, sweep_interval=0.1, sweep_grace=0.1)
    with (
        embedded_redis(tmp_path, settings=slow) as server,
        redis_connection.connect(server.url, "test") as client,
        running(changed(settings, redis_url=server.url)),
    ):
        kept = add_pending(connection)
        eventually(lambda: status_of(connection, kept) == "enqueued", 10)
        for n in range(40):
            client.setrange(f"padding:{n}", 2_000_000, "x")
        client.save()
        lost = add_pending(connection)
        eventually(lambda: status_of(connection, lost) == "enqueued", 10)
        _stop(server)
        while_away = add_pending(connection)
        eventually(lambda: events_in(lines, "Redis is away"), 10)

        server.restart()
        refused = eventually(lambda: _refused_while_loading(client), 10, "the relay gets LOADING")
        eventually(lambda: _refused_while_loading(client) > refused, 10, "it tries again")
        assert _deliveries(connection) == [("enqueued", 1), ("enqueued", 1), ("pending", 0)]
        assert client.info("persistence")["loading"], "all that was while it was loading"

        eventually(lambda: status_of(connection, while_away) == "enqueued", 20, "Redis is used again")
        eventually(lambda: sorted(queued(client)) == [b"1-1", b"2-2", b"3-1"], 10, "all rows are there")
    assert events_in(lines, "Redis is away", "Redis is back") == ["Redis is away", "Redis is back"]


def _refused_while_loading(client: redis.Redis) -> int:
    try:
        refused = client.info("errorstats").get("errorstat_LOADING", {"count": 0})
    except redis_connection.AWAY:
        return 0
    return int(refused["count"])


def _deliveries(connection: Connection) -> list[tuple[str, int]]:
    rows = connection.execute("SELECT status, delivery FROM outbox ORDER BY id").fetchall()
    return [(row["status"], row["delivery"]) for row in rows]


def test_redis_may_be_away_from_the_start(
    connection: Connection, relay_settings: RelaySettings, tmp_path: Path, lines: list[Any]
) -> None:
    """The relay starts without it, does what it can, and logs it once."""
    connection.execute(
        "INSERT INTO outbox (task, payload, status, lease_until) VALUES ('t', '{}', 'running', '2000-01-01')"
    )
    with running(changed(relay_settings, redis_url=f"unix://{tmp_path}/none.sock", lease=0.2)):
        eventually(lambda: status_of(connection, 1) == "pending", 10, "rescue goes on")
        eventually(lambda: events_in(lines, "Redis is away"), 10)
    assert events_in(lines, "Redis is away", "Redis is back") == ["Redis is away"]


def test_postgres_away_is_a_line_at_each_end(
    relay_settings: RelaySettings, file_postgres: EmbeddedServer, redis_client: redis.Redis, lines: list[Any]
) -> None:
    """Postgres stops and comes back: one line each, and the relay goes on."""
    settings = changed(relay_settings, database_url=file_postgres.url, poll_interval=0.1)
    with running(settings):
        with postgres.connect(file_postgres.url, "test") as connection:
            first = add_pending(connection)
            eventually(lambda: status_of(connection, first) == "enqueued", 10)
        _stop(file_postgres)
        eventually(lambda: events_in(lines, "Postgres is away"), 10)
        file_postgres.restart()
        eventually(lambda: events_in(lines, "Postgres is back"), 20)
        with postgres.connect(file_postgres.url, "test") as connection:
            second = add_pending(connection)
            eventually(lambda: status_of(connection, second) == "enqueued", 10)
    assert events_in(lines, "Postgres is away", "Postgres is back") == ["Postgres is away", "Postgres is back"]


def test_no_row_is_rescued_just_after_postgres_stalled(
    relay_settings: RelaySettings, file_postgres: EmbeddedServer, redis_client: redis.Redis, lines: list[Any]
) -> None:
    """A stall breaks no connection, but live workers cannot renew during it: they get time to do so."""
    settings = changed(relay_settings, database_url=file_postgres.url, poll_interval=0.1, lease=2.5)
    with postgres.connect(file_postgres.url, "test") as connection, running(settings):
        row = connection.execute(
            "INSERT INTO outbox (task, payload, status, attempts, delivery, lease_until)"
            " VALUES ('t', '{}', 'running', 1, 1, now() + interval '1 min') RETURNING id"
        ).fetchone()
        assert row is not None
        # A relay waits after its start.
        waited = time.monotonic()
        eventually(lambda: time.monotonic() - waited > settings.lease, 10, "the relay's own first wait")
        connection.execute("UPDATE outbox SET lease_until = now() + interval '1 s' WHERE id = %s", [row["id"]])
        with frozen(file_postgres):
            began = time.monotonic()
            eventually(lambda: time.monotonic() - began > 3, 10, "a stall for longer than the lease has left")
        passed = add_pending(connection)
        eventually(lambda: status_of(connection, passed) == "enqueued", 10, "the relay goes on")
        assert status_of(connection, row["id"]) == "running"
        eventually(lambda: status_of(connection, row["id"]) != "running", 10, "it is rescued, as no worker renews it")
    assert not events_in(lines, "Postgres is away"), "the connection held"


def test_no_row_is_rescued_just_after_postgres_was_away(
    relay_settings: RelaySettings, file_postgres: EmbeddedServer, redis_client: redis.Redis, lines: list[Any]
) -> None:
    """For a lease, live workers may renew leases that expired in the outage; then other rows are rescued."""
    settings = changed(relay_settings, database_url=file_postgres.url, poll_interval=0.1, lease=2.5)
    with running(settings):
        with postgres.connect(file_postgres.url, "test") as connection:
            renewed, lost = (
                row["id"]
                for row in connection.execute(
                    "INSERT INTO outbox (task, payload, status, attempts, delivery, worker, lease_until)"
                    " SELECT 't', '{}', 'running', 1, 1, 'w', now() + interval '1 min' FROM generate_series(1, 2)"
                    " RETURNING id"
                ).fetchall()
            )
        _stop(file_postgres)
        stopped = time.monotonic()
        eventually(lambda: events_in(lines, "Postgres is away"), 10)
        eventually(lambda: time.monotonic() - stopped > RESCUE_INTERVAL + settings.lease / 3, 10, "a long outage")
        file_postgres.restart()
        eventually(lambda: events_in(lines, "Postgres is back"), 20)

        with postgres.connect(file_postgres.url, "test") as connection:
            connection.execute("UPDATE outbox SET lease_until = '2000-01-01' WHERE id IN (%s, %s)", [renewed, lost])
            # Tried again, as a worker does: the relay may hold the row's lock.
            renewal = {"ids": [renewed], "deliveries": [1], "lease": 60.0, "worker": "w"}
            eventually(lambda: connection.execute(query("renew_leases"), renewal).fetchall(), 2, "the lease is renewed")
            eventually(lambda: status_of(connection, lost) != "running", 10, "the lost row is rescued")
            # A rescued row's time is that of the rescue.
            found = connection.execute(
                "SELECT extract(epoch FROM run_at - backend_start)::float8 AS waited FROM outbox, pg_stat_activity"
                " WHERE id = %s AND application_name = 'outbox relay' AND datname = current_database()",
                [lost],
            ).fetchone()
            assert found is not None
            assert found["waited"] >= settings.lease
            assert status_of(connection, renewed) == "running"


def test_a_postgres_that_hangs_is_away(
    relay_settings: RelaySettings,
    file_postgres: EmbeddedServer,
    redis_client: redis.Redis,
    lines: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Postgres that keeps its connections but answers nothing is noticed, and does not delay a stop."""
    monkeypatch.setattr(postgres, "ANSWER_LIMIT", 0.5)
    monkeypatch.setitem(postgres.LIMITS, "connect_timeout", 2)
    settings = changed(relay_settings, database_url=file_postgres.url, poll_interval=0.1)
    with postgres.connect(file_postgres.url, "test") as connection, running(settings):
        eventually(lambda: events_in(lines, "started"), 10)
        with frozen(file_postgres):
            eventually(lambda: events_in(lines, "Postgres is away"), 10)
            with running(settings):
                pass  # stopped while it cannot even connect
        row = add_pending(connection)
        eventually(lambda: status_of(connection, row) == "enqueued", 10)
        eventually(lambda: events_in(lines, "Postgres is back"), 5)


def test_a_postgres_that_takes_no_writes_is_away(
    connection: Connection, relay_settings: RelaySettings, lines: list[Any]
) -> None:
    """A standby that is not promoted yet is an outage, logged once and not per try."""

    def read_only(to: str) -> None:
        name = psycopg.sql.Identifier(connection.info.dbname)
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(
            psycopg.sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = {}").format(
                name,
                psycopg.sql.SQL(to),
            )
        )

    row = add_pending(connection)
    read_only("on")
    with running(changed(relay_settings, poll_interval=0.1)):
        eventually(lambda: events_in(lines, "Postgres is away"), 10)
        tries = _sessions(connection)
        eventually(lambda: _sessions(connection) > tries + 2, 15, "it tries again")
        assert len(events_in(lines, "Postgres is away", "Postgres is back")) == 1
        read_only("off")
        eventually(lambda: status_of(connection, row) == "enqueued", 10)
        eventually(lambda: events_in(lines, "Postgres is back"), 5)


def _sessions(connection: Connection) -> int:
    row = connection.execute("SELECT sessions FROM pg_stat_database WHERE datname = current_database()").fetchone()
    assert row is not None
    return int(row["sessions"])


def test_it_stops_in_the_middle_of_a_wait(relay_settings: RelaySettings, lines: list[Any], tmp_path: Path) -> None:
    """A stop is obeyed while neither server answers."""
    away = {"database_url": f"postgresql:///x?host={tmp_path}", "redis_url": f"unix://{tmp_path}/none.sock"}
    with running(changed(relay_settings, **away)):
        eventually(lambda: events_in(lines, "Postgres is away"), 10)
    assert events_in(lines, "stopped") == ["stopped"]
