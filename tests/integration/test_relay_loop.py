"""The relay as a whole: woken by hints, polling without them, and alive through outages of either server."""

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import psycopg
import pytest
import redis
from structlog.testing import capture_logs

from outbox.devstack.embedded import EmbeddedServer, embedded_redis
from outbox.errors import NotMigratedError, UnsupportedRedisError
from outbox.queries import query
from outbox.runtime import postgres, redis_connection
from outbox.runtime.settings import RelaySettings
from outbox.runtime.stop import Stop
from outbox_relay import loop
from outbox_relay.duty import Duty
from outbox_relay.loop import Relay
from outbox_relay.rescue import RESCUE_INTERVAL, SETTLING_TIME
from tests.support.processes import frozen
from tests.support.servers import cluster_settings
from tests.support.waiting import eventually

Connection = psycopg.Connection[dict[str, Any]]


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    """All that is logged meanwhile."""
    with capture_logs() as captured:
        yield captured


@contextmanager
def _running(settings: RelaySettings) -> Iterator[Thread]:
    """Runs a relay in a thread; it must still live in the end, and stop when told."""
    stop = Stop()
    thread = Thread(target=Relay(settings, stop).run, name="relay", daemon=True)
    thread.start()
    try:
        yield thread
        assert thread.is_alive()
    finally:
        stop.request()
        thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A Redis that a test may stop."""
    with embedded_redis(tmp_path / "own_redis") as server:
        yield server


def _stop(server: EmbeddedServer) -> None:
    server.process.send_signal(signal.SIGINT)
    server.process.wait(20)


def _add(connection: Connection, queue: str = "default", delay: float = 0) -> int:
    row = connection.execute(
        "INSERT INTO outbox (task, payload, queue, run_at)"
        " VALUES ('t', '{}', %s, now() + make_interval(secs => %s)) RETURNING id",
        [queue, delay],
    ).fetchone()
    assert row is not None
    return int(row["id"])


def _status(connection: Connection, row: int) -> str:
    found = connection.execute("SELECT status FROM outbox WHERE id = %s", [row]).fetchone()
    assert found is not None
    return str(found["status"])


def _queued(client: redis.Redis, queue: str = "default") -> list[Any]:
    return client.lrange(f"rq:queue:{queue}", 0, -1)


def _hint(connection: Connection, row: int) -> int:
    connection.execute(query("notify_relays"))
    return row


def _events(lines: list[Any], *events: str) -> list[str]:
    return [line["event"] for line in lines if line["event"] in events]


def _with(settings: RelaySettings, **changes: Any) -> RelaySettings:
    return settings.model_copy(update=changes)


def test_a_hint_wakes_it(connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings) -> None:
    """With a poll interval of half a minute, a row is handed over as soon as its NOTIFY comes."""
    with _running(_with(relay_settings, poll_interval=30.0)):
        first = _add(connection)
        eventually(lambda: _status(connection, _hint(connection, first)) == "enqueued", 10)
        second = _add(connection, "critical")
        connection.execute(query("notify_relays"))
        eventually(lambda: _status(connection, second) == "enqueued", 5, "the hint wakes the relay")
    assert (_queued(redis_client), _queued(redis_client, "critical")) == ([b"1-1"], [b"2-1"])


def test_hints_that_came_together_wake_it_once(connection: Connection, relay_settings: RelaySettings) -> None:
    """However many hints have arrived during other statements, none is left that would wake an idle relay later."""
    relay = Relay(relay_settings, Stop())
    with postgres.connect(relay_settings.database_url, "test") as listening:
        relay._listen(listening)
        for _ in range(50):
            connection.execute(query("notify_relays"))
            listening.execute("SELECT 1")
        assert relay._wait(listening, 5)
        assert not relay._wait(listening, 0)


def test_polling_alone_serves(connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings) -> None:
    """Where no hint ever comes, as behind PgBouncer, rows are handed over all the same."""
    with _running(_with(relay_settings, poll_interval=0.1)):
        row = _add(connection)
        eventually(lambda: _status(connection, row) == "enqueued", 5)


@pytest.mark.parametrize("code", ["0A000", "08P01"])
def test_where_listen_is_refused_it_polls(
    connection: Connection,
    relay_settings: RelaySettings,
    lines: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    code: str,
) -> None:
    """A pooler's error to LISTEN ends nothing: one warning, over two connections, and a poll a second from then on."""
    refusal = f"DO $$ BEGIN RAISE 'no LISTEN here' USING ERRCODE = '{code}'; END $$"
    monkeypatch.setattr(loop, "query", lambda name: refusal if name == "listen" else query(name))
    with _running(_with(relay_settings, poll_interval=30.0)):
        eventually(lambda: _events(lines, "polling without LISTEN"), 10)
        first = _add(connection)
        eventually(lambda: _status(connection, first) == "enqueued", 5, "it is found")
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'outbox relay' AND datname = current_database()"
        )
        eventually(lambda: _events(lines, "Postgres is back"), 10)
        second = _add(connection)
        eventually(lambda: _status(connection, second) == "enqueued", 5, "it is found over the second connection")
    (warning,) = [line for line in lines if line["event"] == "polling without LISTEN"]
    assert warning["log_level"] == "warning"
    assert "no LISTEN here" in warning["why"]


def test_a_delayed_row_goes_out_at_its_time(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """It waits in rq-scheduler's set, and is in its queue neither before its time nor a second after."""
    with _running(_with(relay_settings, poll_interval=0.1)):
        _add(connection, delay=1.2)
        eventually(lambda: redis_client.zcard("rq:scheduler:scheduled_jobs"), 5, "the job is scheduled")
        assert _queued(redis_client) == []
        eventually(lambda: _queued(redis_client) == [b"1-1"], 5, "the job is queued")
        late = connection.execute(
            "SELECT extract(epoch FROM clock_timestamp() - run_at)::float8 AS seconds FROM outbox"
        ).fetchone()
    assert late is not None
    assert 0 <= late["seconds"] < 1


def test_every_duty_is_done(connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings) -> None:
    """Lost jobs, dead workers' rows, old history and strangers' keys: nobody has to do anything."""
    settings = _with(relay_settings, poll_interval=0.1, sweep_interval=0.1, sweep_grace=0.1, lease=0.2)
    connection.execute("INSERT INTO outbox (task, payload, status, done_at) VALUES ('t', '{}', 'done', '2000-01-01')")
    connection.execute(
        "INSERT INTO outbox (task, payload, status, lease_until) VALUES ('t', '{}', 'running', '2000-01-01')"
    )
    redis_client.set("rq:queue:default", "a stranger's")
    with _running(settings):
        eventually(lambda: _queued_or_nothing(redis_client) == [b"2-1"], 10, "the rescued row is handed over")
        assert connection.execute("SELECT id FROM outbox WHERE id = 1").fetchall() == []
        redis_client.flushall()
        eventually(lambda: _queued(redis_client) == [b"2-2"], 10, "the swept row is handed over")


def test_redis_never_holds_more_than_the_window(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """From a full window until the backlog is worked off: due and scheduled jobs of a queue together are within it."""
    window = 50
    connection.execute(
        "INSERT INTO outbox (task, payload, queue, run_at)"
        " SELECT 't', '{}', queue, now() + make_interval(secs => greatest(0, n - 100) * 0.01)"
        " FROM unnest(ARRAY['critical', 'default']) AS queue, generate_series(1, 200) AS n"
    )
    queue_of = {row["id"]: row["queue"] for row in connection.execute("SELECT id, queue FROM outbox")}

    def held() -> Counter[str]:
        pipeline = redis_client.pipeline(transaction=True)
        pipeline.zrange("rq:scheduler:scheduled_jobs", 0, -1)
        for queue in ("critical", "default"):
            pipeline.lrange(f"rq:queue:{queue}", 0, -1)
        return Counter(queue_of[_row_of(job)] for jobs in pipeline.execute() for job in jobs)

    def work_off() -> bool:
        assert max(held().values(), default=0) <= window
        taken = [job for queue in ("critical", "default") for job in redis_client.lpop(f"rq:queue:{queue}", 7) or []]
        connection.execute(  # it waits for a relay that has not committed yet
            "UPDATE outbox SET status = 'done', done_at = now() WHERE id = ANY (%s)", [list(map(_row_of, taken))]
        )
        return not connection.execute("SELECT FROM outbox WHERE status <> 'done'").fetchall()

    with _running(_with(relay_settings, poll_interval=0.02, batch=20, window=window)):
        eventually(lambda: held() == {"critical": window, "default": window}, 10, "both windows are full")
        eventually(work_off, 20, "all are done")


def _row_of(job_id: Any) -> int:
    return int(job_id.partition(b"-")[0])


def _queued_or_nothing(client: redis.Redis) -> list[bytes]:
    try:
        return _queued(client)
    except redis.ResponseError:
        return []


def test_redis_away_is_a_line_at_each_end(
    connection: Connection, relay_settings: RelaySettings, own_redis: EmbeddedServer, lines: list[Any]
) -> None:
    """Redis stops and comes back empty: one line each, the process stays up, and every row reaches a queue."""
    settings = _with(relay_settings, redis_url=own_redis.url, poll_interval=0.1, sweep_interval=0.2, sweep_grace=0.1)
    with _running(settings), redis_connection.connect(own_redis.url, "test") as client:
        before = _add(connection)
        eventually(lambda: _status(connection, before) == "enqueued", 10)
        _stop(own_redis)
        while_away = _add(connection)
        eventually(lambda: _events(lines, "Redis is away"), 10)
        own_redis.restart()
        eventually(lambda: _status(connection, while_away) == "enqueued", 10, "Redis is used again")
        eventually(lambda: sorted(_queued(client)) == [b"1-2", b"2-1"], 10, "both rows are there")
    assert _events(lines, "Redis is away", "Redis is back") == ["Redis is away", "Redis is back"]


@pytest.mark.parametrize("queue", ["critical", "default"])
def test_a_redis_without_memory_is_away(
    connection: Connection, relay_settings: RelaySettings, own_redis: EmbeddedServer, lines: list[Any], queue: str
) -> None:
    """A Redis that answers and takes no writes does not come and go with every try."""
    settings = _with(relay_settings, redis_url=own_redis.url, poll_interval=0.05, sweep_interval=0.1)
    with redis_connection.connect(own_redis.url, "test") as client, _running(settings):
        client.config_set("maxmemory", "1")
        row = _add(connection, queue)
        eventually(lambda: _events(lines, "Redis is away"), 10)
        tries = client.info("stats")["total_commands_processed"]
        eventually(lambda: client.info("stats")["total_commands_processed"] > tries + 30, 10, "it tries again")
        assert _events(lines, "Redis is back") == []
        client.config_set("maxmemory", "0")
        eventually(lambda: _status(connection, row) == "enqueued", 10)
    assert _events(lines, "Redis is away", "Redis is back") == ["Redis is away", "Redis is back"]


def test_a_redis_that_is_loading_is_away(
    connection: Connection, relay_settings: RelaySettings, tmp_path: Path, lines: list[Any]
) -> None:
    """A Redis that still reads its file answers, and nothing that it does not tell is taken for lost.

    Afterwards what the file had is there as before, and what was handed over since it was written is handed over again.
    """
    # It waits at every key (µs), and after every 2 MB it answers what has come meanwhile.
    slow = ["key-load-delay 80000", "rdbcompression no"]
    settings = _with(relay_settings, poll_interval=0.1, sweep_interval=0.1, sweep_grace=0.1)
    with (
        embedded_redis(tmp_path, settings=slow) as server,
        redis_connection.connect(server.url, "test") as client,
        _running(_with(settings, redis_url=server.url)),
    ):
        kept = _add(connection)
        eventually(lambda: _status(connection, kept) == "enqueued", 10)
        for n in range(40):
            client.setrange(f"padding:{n}", 2_000_000, "x")
        client.save()
        lost = _add(connection)
        eventually(lambda: _status(connection, lost) == "enqueued", 10)
        _stop(server)
        while_away = _add(connection)
        eventually(lambda: _events(lines, "Redis is away"), 10)

        server.restart()
        told = eventually(lambda: _refused_while_loading(client), 10, "the relay is told LOADING")
        eventually(lambda: _refused_while_loading(client) > told, 10, "it tries again")
        assert _deliveries(connection) == [("enqueued", 1), ("enqueued", 1), ("pending", 0)]
        assert client.info("persistence")["loading"], "all that was while it was loading"

        eventually(lambda: _status(connection, while_away) == "enqueued", 20, "Redis is used again")
        eventually(lambda: sorted(_queued(client)) == [b"1-1", b"2-2", b"3-1"], 10, "all rows are there")
    assert _events(lines, "Redis is away", "Redis is back") == ["Redis is away", "Redis is back"]


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
    """The relay starts without it, does what it can without it, and says so once."""
    connection.execute(
        "INSERT INTO outbox (task, payload, status, lease_until) VALUES ('t', '{}', 'running', '2000-01-01')"
    )
    with _running(_with(relay_settings, redis_url=f"unix://{tmp_path}/none.sock", lease=0.2)):
        eventually(lambda: _status(connection, 1) == "pending", 10, "rescue goes on")
        eventually(lambda: _events(lines, "Redis is away"), 10)
    assert _events(lines, "Redis is away", "Redis is back") == ["Redis is away"]


def test_postgres_away_is_a_line_at_each_end(
    relay_settings: RelaySettings, file_postgres: EmbeddedServer, redis_client: redis.Redis, lines: list[Any]
) -> None:
    """Postgres stops and comes back: one line each, and the relay goes on where it was."""
    settings = _with(relay_settings, database_url=file_postgres.url, poll_interval=0.1)
    with _running(settings):
        with postgres.connect(file_postgres.url, "test") as connection:
            first = _add(connection)
            eventually(lambda: _status(connection, first) == "enqueued", 10)
        _stop(file_postgres)
        eventually(lambda: _events(lines, "Postgres is away"), 10)
        file_postgres.restart()
        eventually(lambda: _events(lines, "Postgres is back"), 20)
        with postgres.connect(file_postgres.url, "test") as connection:
            second = _add(connection)
            eventually(lambda: _status(connection, second) == "enqueued", 10)
    assert _events(lines, "Postgres is away", "Postgres is back") == ["Postgres is away", "Postgres is back"]


def test_nobody_is_rescued_just_after_postgres_stalled(
    relay_settings: RelaySettings, file_postgres: EmbeddedServer, redis_client: redis.Redis, lines: list[Any]
) -> None:
    """A stall breaks no connection, and keeps the living workers from renewing all the same: they get their time."""
    settings = _with(relay_settings, database_url=file_postgres.url, poll_interval=0.1, lease=2.5)
    with postgres.connect(file_postgres.url, "test") as connection, _running(settings):
        row = connection.execute(
            "INSERT INTO outbox (task, payload, status, attempts, delivery, lease_until)"
            " VALUES ('t', '{}', 'running', 1, 1, now() + interval '1 min') RETURNING id"
        ).fetchone()
        assert row is not None
        # A relay that has just started waits anyway.
        waited = time.monotonic()
        eventually(lambda: time.monotonic() - waited > settings.lease, 10, "the relay's own first wait")
        connection.execute("UPDATE outbox SET lease_until = now() + interval '1 s' WHERE id = %s", [row["id"]])
        with frozen(file_postgres):
            began = time.monotonic()
            eventually(lambda: time.monotonic() - began > 3, 10, "a stall for longer than the lease has left")
        passed = _add(connection)
        eventually(lambda: _status(connection, passed) == "enqueued", 10, "the relay goes on")
        assert _status(connection, row["id"]) == "running"
        eventually(lambda: _status(connection, row["id"]) != "running", 10, "it is rescued, as nobody renews it")
    assert not _events(lines, "Postgres is away"), "the connection held"


def test_nobody_is_rescued_just_after_postgres_was_away(
    relay_settings: RelaySettings, file_postgres: EmbeddedServer, redis_client: redis.Redis, lines: list[Any]
) -> None:
    """For a lease's length the living workers may renew what ran out during the outage; then the others are rescued."""
    settings = _with(relay_settings, database_url=file_postgres.url, poll_interval=0.1, lease=2.5)
    with _running(settings):
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
        eventually(lambda: _events(lines, "Postgres is away"), 10)
        eventually(lambda: time.monotonic() - stopped > RESCUE_INTERVAL + settings.lease / 3, 10, "a long outage")
        file_postgres.restart()
        eventually(lambda: _events(lines, "Postgres is back"), 20)

        with postgres.connect(file_postgres.url, "test") as connection:
            connection.execute("UPDATE outbox SET lease_until = '2000-01-01' WHERE id IN (%s, %s)", [renewed, lost])
            # As a worker does: the relay's look may hold the row's lock at that very moment.
            renewal = {"ids": [renewed], "deliveries": [1], "lease": 60.0, "worker": "w"}
            eventually(lambda: connection.execute(query("renew_leases"), renewal).fetchall(), 2, "the lease is renewed")
            eventually(lambda: _status(connection, lost) != "running", 10, "the lost row is rescued")
            # A rescued row's time is that of the rescue.
            found = connection.execute(
                "SELECT extract(epoch FROM run_at - backend_start)::float8 AS waited FROM outbox, pg_stat_activity"
                " WHERE id = %s AND application_name = 'outbox relay' AND datname = current_database()",
                [lost],
            ).fetchone()
            assert found is not None
            assert found["waited"] >= settings.lease
            assert _status(connection, renewed) == "running"


def test_a_postgres_that_hangs_is_away(
    relay_settings: RelaySettings,
    file_postgres: EmbeddedServer,
    redis_client: redis.Redis,
    lines: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Postgres that keeps its connections and answers nothing is noticed, and holds up no stop."""
    monkeypatch.setattr(postgres, "ANSWER_LIMIT", 0.5)
    monkeypatch.setitem(postgres.LIMITS, "connect_timeout", 2)
    settings = _with(relay_settings, database_url=file_postgres.url, poll_interval=0.1)
    with postgres.connect(file_postgres.url, "test") as connection, _running(settings):
        eventually(lambda: _events(lines, "started"), 10)
        with frozen(file_postgres):
            eventually(lambda: _events(lines, "Postgres is away"), 10)
            with _running(settings):
                pass  # stopped while it cannot even connect
        row = _add(connection)
        eventually(lambda: _status(connection, row) == "enqueued", 10)
        eventually(lambda: _events(lines, "Postgres is back"), 5)


def test_an_expiry_that_was_mended_is_forgotten(
    connection: Connection, relay_settings: RelaySettings, lines: list[Any]
) -> None:
    """A lease that expires for the second time, long after it was renewed, takes two steps again."""
    relay = Relay(relay_settings, Stop())
    # Its first look would pause the rescue: leases may have expired before its start.
    relay._rescue.note_look(time.time(), time.monotonic(), math.inf)
    nothing = [Duty("nothing", lambda _: None, 60.0, has_work=lambda _: False)]
    connection.execute(
        "INSERT INTO outbox (task, payload, status, attempts, delivery, worker, lease_until)"
        " VALUES ('t', '{}', 'running', 1, 1, 'w1', now() - interval '1 s')"
    )
    relay._look(nothing, connection)
    connection.execute(query("renew_leases"), {"ids": [1], "deliveries": [1], "lease": 60.0, "worker": "w1"})
    relay._look(nothing, connection)
    seen = time.monotonic()
    eventually(lambda: time.monotonic() - seen > SETTLING_TIME, 5, "the first time would have been old enough")
    connection.execute("UPDATE outbox SET lease_until = now() - interval '1 s'")
    relay._look(nothing, connection)
    assert _status(connection, 1) == "running"
    eventually(lambda: relay._look(nothing, connection) and _status(connection, 1) != "running", 5, "it is rescued")


def test_done_rows_that_others_refer_to_hold_up_nobody(
    connection: Connection, relay_settings: RelaySettings, lines: list[Any]
) -> None:
    """A foreign key that keeps old rows from being deleted costs the log an error, and rows are handed over."""
    connection.execute("CREATE TABLE audit (outbox_id bigint REFERENCES outbox)")
    connection.execute(
        "INSERT INTO outbox (task, payload, status, done_at) VALUES ('t', '{}', 'done', now() - interval '1 year')"
    )
    connection.execute("INSERT INTO audit SELECT id FROM outbox")
    with _running(relay_settings):
        row = _add(connection)
        eventually(lambda: _status(connection, row) == "enqueued", 5)
        eventually(lambda: _events(lines, "done rows cannot be deleted"), 5)


def test_a_postgres_that_takes_no_writes_is_away(
    connection: Connection, relay_settings: RelaySettings, lines: list[Any]
) -> None:
    """A standby that has not been promoted yet is an outage like any other, and not a line per try."""

    def read_only(to: str) -> None:
        name = psycopg.sql.Identifier(connection.info.dbname)
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(
            psycopg.sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = {}").format(
                name,
                psycopg.sql.SQL(to),
            )
        )

    row = _add(connection)
    read_only("on")
    with _running(_with(relay_settings, poll_interval=0.1)):
        eventually(lambda: _events(lines, "Postgres is away"), 10)
        tries = _sessions(connection)
        eventually(lambda: _sessions(connection) > tries + 2, 15, "it tries again")
        assert len(_events(lines, "Postgres is away", "Postgres is back")) == 1
        read_only("off")
        eventually(lambda: _status(connection, row) == "enqueued", 10)
        eventually(lambda: _events(lines, "Postgres is back"), 5)


def _sessions(connection: Connection) -> int:
    row = connection.execute("SELECT sessions FROM pg_stat_database WHERE datname = current_database()").fetchone()
    assert row is not None
    return int(row["sessions"])


def test_an_unmigrated_database_ends_it(
    create_database: Callable[[str | None], str], relay_settings: RelaySettings, lines: list[Any]
) -> None:
    """It does not wait for somebody to migrate: the sentence says which command to run, and the log that it stopped."""
    with pytest.raises(NotMigratedError, match="outbox migrate"):
        Relay(_with(relay_settings, database_url=create_database(None)), Stop()).run()
    assert _events(lines, "started", "stopped") == ["started", "stopped"]


def test_a_cluster_ends_it(relay_settings: RelaySettings, tmp_path: Path) -> None:
    """RQ cannot work on a Redis cluster: a sentence at once, and not an outage for ever."""
    with (
        embedded_redis(tmp_path, settings=cluster_settings()) as server,
        pytest.raises(UnsupportedRedisError, match="names a Redis cluster"),
    ):
        Relay(_with(relay_settings, redis_url=server.url), Stop()).run()


def test_it_can_be_stopped_before_it_starts(relay_settings: RelaySettings) -> None:
    """A stop that came early is kept."""
    stop = Stop()
    stop.request()
    Relay(relay_settings, stop).run()


def test_it_stops_in_the_middle_of_a_wait(relay_settings: RelaySettings, lines: list[Any], tmp_path: Path) -> None:
    """SIGTERM is obeyed while neither server answers."""
    away = {"database_url": f"postgresql:///x?host={tmp_path}", "redis_url": f"unix://{tmp_path}/none.sock"}
    with _running(_with(relay_settings, **away)):
        eventually(lambda: _events(lines, "Postgres is away"), 10)
    assert _events(lines, "stopped") == ["stopped"]
