"""A relay's loop: hints wake it, it polls without them, and it does every duty."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from structlog.testing import capture_logs

from outbox.devstack.embedded import embedded_redis
from outbox.errors import NotMigratedError, UnsupportedRedisError
from outbox.queries import query
from outbox.runtime import postgres
from outbox.runtime.settings import RelaySettings
from outbox.runtime.stop import Stop
from outbox_relay import loop
from outbox_relay.duty import Duty
from outbox_relay.loop import Relay
from outbox_relay.rescue import SETTLING_TIME
from tests.support.relays import add_pending, changed, events_in, queued, running, status_of
from tests.support.servers import cluster_settings
from tests.support.waiting import eventually

Connection = psycopg.Connection[dict[str, Any]]


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    """All log lines of the test."""
    with capture_logs() as captured:
        yield captured


def _hint(connection: Connection, row: int) -> int:
    connection.execute(query("notify_relays"))
    return row


def test_a_hint_wakes_it(connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings) -> None:
    """With a poll interval of half a minute, a row is handed over as soon as its NOTIFY comes."""
    with running(changed(relay_settings, poll_interval=30.0)):
        first = add_pending(connection)
        eventually(lambda: status_of(connection, _hint(connection, first)) == "enqueued", 10)
        second = add_pending(connection, "critical")
        connection.execute(query("notify_relays"))
        eventually(lambda: status_of(connection, second) == "enqueued", 5, "the hint wakes the relay")
    assert (queued(redis_client), queued(redis_client, "critical")) == ([b"1-1"], [b"2-1"])


def test_hints_that_came_together_wake_it_once(connection: Connection, relay_settings: RelaySettings) -> None:
    """Hints that arrived during other statements are consumed together: none is left to wake an idle relay."""
    relay = Relay(relay_settings, Stop())
    with postgres.connect(relay_settings.database_url, "test") as listening:
        relay._listen(listening)
        for _ in range(50):
            connection.execute(query("notify_relays"))
            listening.execute("SELECT 1")
        assert relay._wait(listening, 5)
        assert not relay._wait(listening, 0)


def test_polling_alone_serves(connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings) -> None:
    """Without hints, as behind PgBouncer, polling hands rows over."""
    with running(changed(relay_settings, poll_interval=0.1)):
        row = add_pending(connection)
        eventually(lambda: status_of(connection, row) == "enqueued", 5)


@pytest.mark.parametrize("code", ["0A000", "08P01"])
def test_where_listen_is_refused_it_polls(
    connection: Connection,
    relay_settings: RelaySettings,
    lines: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    code: str,
) -> None:
    """If a pooler refuses LISTEN, there is one warning, also over two connections, and the relay polls every second."""
    refusal = f"DO $$ BEGIN RAISE 'no LISTEN here' USING ERRCODE = '{code}'; END $$"
    monkeypatch.setattr(loop, "query", lambda name: refusal if name == "listen" else query(name))
    with running(changed(relay_settings, poll_interval=30.0)):
        eventually(lambda: events_in(lines, "polling without LISTEN"), 10)
        first = add_pending(connection)
        eventually(lambda: status_of(connection, first) == "enqueued", 5, "it is found")
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'outbox relay' AND datname = current_database()"
        )
        eventually(lambda: events_in(lines, "Postgres is back"), 10)
        second = add_pending(connection)
        eventually(lambda: status_of(connection, second) == "enqueued", 5, "it is found over the second connection")
    (warning,) = [line for line in lines if line["event"] == "polling without LISTEN"]
    assert warning["log_level"] == "warning"
    assert "no LISTEN here" in warning["why"]


def test_a_delayed_row_goes_out_at_its_time(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """It waits in rq-scheduler's set, and reaches its queue within a second of its time."""
    with running(changed(relay_settings, poll_interval=0.1)):
        add_pending(connection, delay=1.2)
        eventually(lambda: redis_client.zcard("rq:scheduler:scheduled_jobs"), 5, "the job is scheduled")
        assert queued(redis_client) == []
        eventually(lambda: queued(redis_client) == [b"1-1"], 5, "the job is queued")
        late = connection.execute(
            "SELECT extract(epoch FROM clock_timestamp() - run_at)::float8 AS seconds FROM outbox"
        ).fetchone()
    assert late is not None
    assert 0 <= late["seconds"] < 1


def test_every_duty_is_done(connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings) -> None:
    """Lost jobs, rows of dead workers, old rows and foreign keys are all dealt with by a running relay."""
    settings = changed(relay_settings, poll_interval=0.1, sweep_interval=0.1, sweep_grace=0.1, lease=0.2)
    connection.execute("INSERT INTO outbox (task, payload, status, done_at) VALUES ('t', '{}', 'done', '2000-01-01')")
    connection.execute(
        "INSERT INTO outbox (task, payload, status, lease_until) VALUES ('t', '{}', 'running', '2000-01-01')"
    )
    redis_client.set("rq:queue:default", "foreign")
    with running(settings):
        eventually(lambda: _queued_or_nothing(redis_client) == [b"2-1"], 10, "the rescued row is handed over")
        assert connection.execute("SELECT id FROM outbox WHERE id = 1").fetchall() == []
        redis_client.flushall()
        eventually(lambda: queued(redis_client) == [b"2-2"], 10, "the swept row is handed over")


def test_redis_never_holds_more_than_the_window(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """From a full window until the backlog is empty, a queue's due and scheduled jobs together stay within it."""
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

    with running(changed(relay_settings, poll_interval=0.02, batch=20, window=window)):
        eventually(lambda: held() == {"critical": window, "default": window}, 10, "both windows are full")
        eventually(work_off, 20, "all are done")


def _row_of(job_id: Any) -> int:
    return int(job_id.partition(b"-")[0])


def _queued_or_nothing(client: redis.Redis) -> list[bytes]:
    try:
        return queued(client)
    except redis.ResponseError:
        return []


def test_a_renewed_lease_is_seen_for_the_first_time_again(
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
    assert status_of(connection, 1) == "running"
    eventually(lambda: relay._look(nothing, connection) and status_of(connection, 1) != "running", 5, "it is rescued")


def test_done_rows_with_foreign_references_block_no_others(
    connection: Connection, relay_settings: RelaySettings, lines: list[Any]
) -> None:
    """If a foreign key keeps old rows from being deleted, an error is logged and rows are still handed over."""
    connection.execute("CREATE TABLE audit (outbox_id bigint REFERENCES outbox)")
    connection.execute(
        "INSERT INTO outbox (task, payload, status, done_at) VALUES ('t', '{}', 'done', now() - interval '1 year')"
    )
    connection.execute("INSERT INTO audit SELECT id FROM outbox")
    with running(relay_settings):
        row = add_pending(connection)
        eventually(lambda: status_of(connection, row) == "enqueued", 5)
        eventually(lambda: events_in(lines, "done rows cannot be deleted"), 5)


def test_an_unmigrated_database_ends_it(
    create_database: Callable[[str | None], str], relay_settings: RelaySettings, lines: list[Any]
) -> None:
    """It does not wait for a migration: the sentence names the command to run, and the log says that it stopped."""
    with pytest.raises(NotMigratedError, match="outbox migrate"):
        Relay(changed(relay_settings, database_url=create_database(None)), Stop()).run()
    assert events_in(lines, "started", "stopped") == ["started", "stopped"]


def test_a_cluster_ends_it(relay_settings: RelaySettings, tmp_path: Path) -> None:
    """RQ cannot use a Redis cluster: the relay ends with one sentence and does not wait as in an outage."""
    with (
        embedded_redis(tmp_path, settings=cluster_settings()) as server,
        pytest.raises(UnsupportedRedisError, match="names a Redis cluster"),
    ):
        Relay(changed(relay_settings, redis_url=server.url), Stop()).run()


def test_it_can_be_stopped_before_it_starts(relay_settings: RelaySettings) -> None:
    """A stop that was requested before the start is obeyed."""
    stop = Stop()
    stop.request()
    Relay(relay_settings, stop).run()
