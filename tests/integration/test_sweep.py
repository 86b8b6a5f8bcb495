"""A sweep takes back rows whose job Redis has lost, and no others."""

import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import redis
from structlog.testing import capture_logs

from outbox.devstack.embedded import embedded_redis
from outbox.queries import query
from outbox.rq_jobs import queue_key
from outbox.runtime import postgres, redis_connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.publish import publish
from outbox_relay.repair import repair
from outbox_relay.schedule import SCHEDULED_JOBS, Schedule
from outbox_relay.sweep import CLAIM_TIME, Sweep

Connection = psycopg.Connection[dict[str, Any]]
QUEUES = ["critical", "default"]


@pytest.fixture
def settings(relay_settings: RelaySettings) -> RelaySettings:
    """Settings without a grace."""
    return relay_settings.model_copy(update={"sweep_grace": 0.0})


@pytest.fixture
def other(database_url: str) -> Iterator[Connection]:
    """A second connection: a worker's or another relay's."""
    with postgres.connect(database_url, "other") as opened:
        yield opened


def sweep(connection: Connection, client: redis.Redis, settings: RelaySettings) -> int:
    """Does both steps of a sweep; returns the number of rows that were taken back."""
    both = Sweep(client, settings)
    both.look(connection)
    return both.take_back(connection)


def _hand_over(
    connection: Connection, client: redis.Redis, settings: RelaySettings, count: int = 1, delay: float = 0
) -> None:
    connection.execute(
        "INSERT INTO outbox (task, payload, run_at) SELECT 't', '{}', now() + make_interval(secs => %s)"
        " FROM generate_series(1, %s)",
        [delay, count],
    )
    assert publish(connection, client, "default", settings) == count


def _states(connection: Connection) -> list[tuple[str, int]]:
    rows = connection.execute("SELECT status, delivery FROM outbox ORDER BY id").fetchall()
    return [(row["status"], row["delivery"]) for row in rows]


def test_what_a_flush_lost_is_handed_over_again(
    connection: Connection, redis_client: redis.Redis, settings: RelaySettings
) -> None:
    """After FLUSHALL every row goes back, with a line each, and its next delivery is a new one."""
    _hand_over(connection, redis_client, settings, 3)
    _hand_over(connection, redis_client, settings, 2, delay=30)
    assert sweep(connection, redis_client, settings) == 0
    redis_client.flushall()
    with capture_logs() as lines:
        assert sweep(connection, redis_client, settings) == 5
    assert len([line for line in lines if line["event"] == "swept row"]) == 5
    assert _states(connection) == [("pending", 1)] * 5
    assert publish(connection, redis_client, "default", settings) == 5
    assert _states(connection) == [("enqueued", 2)] * 5
    assert sweep(connection, redis_client, settings) == 0


def test_one_lost_id_is_noticed(connection: Connection, redis_client: redis.Redis, settings: RelaySettings) -> None:
    """A single job that is gone, as after a lost pop, is told apart from those that wait."""
    _hand_over(connection, redis_client, settings, 3)
    redis_client.lrem("rq:queue:default", 0, "2-1")
    redis_client.delete("rq:job:1-1")  # the hash alone is no loss: workers need the id only
    assert sweep(connection, redis_client, settings) == 1
    assert _states(connection) == [("enqueued", 1), ("pending", 1), ("enqueued", 1)]


def test_a_stale_replicas_older_delivery_is_not_the_row(
    connection: Connection, redis_client: redis.Redis, settings: RelaySettings
) -> None:
    """A Redis that was restored holds an older delivery, which no worker would claim."""
    _hand_over(connection, redis_client, settings)
    redis_client.flushall()
    sweep(connection, redis_client, settings)
    publish(connection, redis_client, "default", settings)
    redis_client.flushall()
    redis_client.rpush("rq:queue:default", "1-1")
    assert sweep(connection, redis_client, settings) == 1


def test_a_job_that_a_stock_worker_pops_is_held(
    connection: Connection, redis_client: redis.Redis, settings: RelaySettings
) -> None:
    """RQ's intermediate list counts, for as long as a living worker could keep a job there."""
    _hand_over(connection, redis_client, settings)
    redis_client.lmove("rq:queue:default", "rq:queue:default:intermediate", "LEFT", "RIGHT")
    assert sweep(connection, redis_client, settings) == 0
    connection.execute("UPDATE outbox SET enqueued_at = now() - interval '10 minutes'")
    assert sweep(connection, redis_client, settings) == 1


def test_a_job_in_another_queue_is_lost(
    connection: Connection, redis_client: redis.Redis, settings: RelaySettings
) -> None:
    """Another client may have moved it to a queue that no worker serves."""
    _hand_over(connection, redis_client, settings, 2)
    connection.execute("UPDATE outbox SET queue = 'elsewhere' WHERE id = 2")  # so that this queue is read too
    redis_client.rpush("rq:queue:elsewhere", "1-1", "2-1")
    redis_client.delete("rq:queue:default")
    assert sweep(connection, redis_client, settings) == 1
    assert _states(connection) == [("pending", 1), ("enqueued", 1)]


def test_a_job_that_was_put_off_for_ever_is_lost(
    connection: Connection, redis_client: redis.Redis, settings: RelaySettings
) -> None:
    """If another client postpones a job to the year 3000, the row is still handed over again."""
    _hand_over(connection, redis_client, settings, delay=30)
    assert sweep(connection, redis_client, settings) == 0
    redis_client.zadd(SCHEDULED_JOBS, {"1-1": 32_503_680_000})
    assert sweep(connection, redis_client, settings) == 1


@pytest.mark.parametrize("score", ["1", "-inf"])
def test_a_job_that_no_relay_moves_is_lost(
    connection: Connection, redis_client: redis.Redis, settings: RelaySettings, score: str
) -> None:
    """A job in rq-scheduler's set whose hash names a foreign queue stays there; its row is taken back."""
    _hand_over(connection, redis_client, settings, 1)
    _hand_over(connection, redis_client, settings, 1, delay=30)
    redis_client.delete(queue_key("default"))
    for job_id in (b"1-1", b"2-1"):
        redis_client.hset(b"rq:job:" + job_id, "origin", "foreign")
        redis_client.zadd(SCHEDULED_JOBS, {job_id: score})
    Schedule(redis_client, QUEUES).move_due(time.time())
    assert redis_client.zcard(SCHEDULED_JOBS) == 2, "no relay moves them"
    assert sweep(connection, redis_client, settings) == 0, "one that knows the queue may be about to"

    connection.execute("UPDATE outbox SET run_at = run_at - interval '61 s' WHERE id = 1")
    assert sweep(connection, redis_client, settings) == 0, "it was handed over a moment ago"
    connection.execute("UPDATE outbox SET enqueued_at = enqueued_at - interval '61 s'")
    assert sweep(connection, redis_client, settings) == 1
    assert _states(connection) == [("pending", 1), ("enqueued", 1)], "the other's time has not come"
    connection.execute("UPDATE outbox SET run_at = run_at - interval '91 s'")
    assert sweep(connection, redis_client, settings) == 1


def test_a_fresh_row_has_a_grace(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """A worker that has popped a job gets time to claim it."""
    _hand_over(connection, redis_client, relay_settings)
    redis_client.flushall()
    assert sweep(connection, redis_client, relay_settings) == 0
    connection.execute("UPDATE outbox SET enqueued_at = now() - interval '3 seconds'")
    assert sweep(connection, redis_client, relay_settings) == 1


def test_only_enqueued_rows_are_swept(
    connection: Connection, redis_client: redis.Redis, settings: RelaySettings
) -> None:
    """Rows that run, are done or dead have no job in Redis, and need none."""
    _hand_over(connection, redis_client, settings, 3)
    redis_client.flushall()
    connection.execute("UPDATE outbox SET status = 'running', lease_until = now() WHERE id = 1")
    connection.execute("UPDATE outbox SET status = 'done', done_at = now() WHERE id = 2")
    connection.execute("UPDATE outbox SET status = 'dead' WHERE id = 3")
    assert sweep(connection, redis_client, settings) == 0


def test_another_relays_queue_is_looked_at_too(
    connection: Connection, redis_client: redis.Redis, settings: RelaySettings
) -> None:
    """Rows of a queue that this relay does not serve, as during a deploy, are not taken for lost."""
    _hand_over(connection, redis_client, settings)
    elsewhere = settings.model_copy(update={"queues": {"critical": 1}})
    assert sweep(connection, redis_client, elsewhere) == 0
    redis_client.flushall()
    assert sweep(connection, redis_client, elsewhere) == 1


def test_a_job_in_a_workers_hands_is_left_alone(
    connection: Connection, redis_client: redis.Redis, settings: RelaySettings
) -> None:
    """A job that is popped at the first step and claimed by the second is not taken back; one that stays missing is."""
    _hand_over(connection, redis_client, settings, 2)
    redis_client.flushall()
    both = Sweep(redis_client, settings)
    assert both.step(connection) == CLAIM_TIME
    connection.execute("UPDATE outbox SET status = 'running', lease_until = now() + interval '1 min' WHERE id = 1")
    assert both.step(connection) is None
    assert _states(connection) == [("running", 1), ("pending", 1)]
    assert both.step(connection) is None


def test_a_row_that_moves_between_the_two_looks_is_left_alone(
    connection: Connection, other: Connection, redis_client: redis.Redis, settings: RelaySettings
) -> None:
    """Claimed, handed over again, or locked by a claim after Postgres was read: the sweep's statement skips it."""
    _hand_over(connection, redis_client, settings, 4)
    candidates = connection.execute(query("unclaimed_rows"), {"grace": 0.0, "clock_error": 60.0}).fetchall()
    other.execute("UPDATE outbox SET status = 'running', lease_until = now() + interval '1 min' WHERE id = 1")
    other.execute("UPDATE outbox SET delivery = 2 WHERE id = 2")
    with other.transaction():
        other.execute("SELECT FROM outbox WHERE id = 3 FOR UPDATE")
        swept = connection.execute(
            query("sweep"),
            {"ids": [row["id"] for row in candidates], "deliveries": [row["delivery"] for row in candidates]},
        ).fetchall()
    assert [row["id"] for row in swept] == [4]
    assert _states(connection) == [("running", 1), ("enqueued", 2), ("enqueued", 1), ("pending", 1)]


def test_relays_sweep_side_by_side(
    connection: Connection, other: Connection, redis_client: redis.Redis, settings: RelaySettings
) -> None:
    """Both miss the same rows. One takes them back, and the other skips them, handed over again or not."""
    _hand_over(connection, redis_client, settings, 2)
    redis_client.flushall()
    first, second = Sweep(redis_client, settings), Sweep(redis_client, settings)
    assert first.look(connection) == second.look(other) == 2
    assert first.take_back(connection) == 2
    connection.execute("UPDATE outbox SET status = 'enqueued', delivery = 2, enqueued_at = now() WHERE id = 1")
    assert second.take_back(other) == 0
    assert _states(connection) == [("enqueued", 2), ("pending", 1)]


def test_garbage_in_the_lists_changes_nothing(
    connection: Connection, redis_client: redis.Redis, settings: RelaySettings
) -> None:
    """Ids that name no delivery are ignored."""
    _hand_over(connection, redis_client, settings, 2)
    redis_client.lpop("rq:queue:default")
    redis_client.rpush("rq:queue:default", b"\xff", b"1-1 ", "01-1", b"x" * 10_000_000, "9" * 30 + "-1")
    redis_client.zadd(SCHEDULED_JOBS, {b"\x00": 1, b"1-1-1": 2})
    assert sweep(connection, redis_client, settings) == 1


@pytest.mark.parametrize("breakage", ["CONFIG SET maxmemory 1", "REPLICAOF 127.0.0.1 1", "SET rq:queue:default x"])
def test_a_redis_that_cannot_serve_is_not_believed(
    connection: Connection, settings: RelaySettings, tmp_path: Any, breakage: str
) -> None:
    """If Redis takes no writes or cannot be read completely, nothing is swept: no hand-over could follow."""
    with embedded_redis(tmp_path) as server, redis_connection.connect(server.url, "test") as client:
        _hand_over(connection, client, settings)
        client.flushall()
        client.execute_command(*breakage.split())
        with pytest.raises(redis.RedisError):
            sweep(connection, client, settings)
        assert _states(connection) == [("enqueued", 1)]


def test_a_redis_that_is_gone_is_not_believed(
    connection: Connection, redis_client: redis.Redis, settings: RelaySettings, tmp_path: Any
) -> None:
    """An outage of Redis alone is no reason to sweep."""
    _hand_over(connection, redis_client, settings)
    with redis_connection.connect(f"unix://{tmp_path}/none.sock", "test") as gone, pytest.raises(redis_connection.AWAY):
        sweep(connection, gone, settings)
    assert _states(connection) == [("enqueued", 1)]


def test_strangers_keys_are_replaced(
    connection: Connection, redis_client: redis.Redis, settings: RelaySettings
) -> None:
    """Keys of a wrong type under our names are deleted, with a line each; those of the right type stay."""
    _hand_over(connection, redis_client, settings, 2)
    for key in ("rq:queue:critical", SCHEDULED_JOBS, "rq:queues", "rq:workers", "rq:queue:default:intermediate"):
        redis_client.set(key, "x")
    with capture_logs() as lines:
        repair(redis_client, QUEUES)
    assert sorted(line["key"] for line in lines if line["event"] == "deleted key") == sorted(
        ["rq:queue:critical", SCHEDULED_JOBS, "rq:queues", "rq:workers", "rq:queue:default:intermediate"]
    )
    assert redis_client.lrange("rq:queue:default", 0, -1) == [b"1-1", b"2-1"]
    with capture_logs() as lines:
        repair(redis_client, QUEUES)
    assert lines == []
