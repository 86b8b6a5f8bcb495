"""Due jobs are moved to their queues, whatever else is in rq-scheduler's set."""

import time
from contextlib import suppress
from typing import Any

import psycopg
import pytest
import redis
from rq.job import Job
from rq.serializers import JSONSerializer
from structlog.testing import capture_logs

from outbox.devstack.embedded import EmbeddedServer
from outbox.runtime import redis_connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.clock import Clock
from outbox_relay.publish import publish
from outbox_relay.schedule import SCHEDULED_JOBS, Schedule
from tests.support.waiting import eventually

Connection = psycopg.Connection[dict[str, Any]]
QUEUES = ["critical", "default"]


@pytest.fixture
def schedule(redis_client: redis.Redis) -> Schedule:
    """The schedule of a relay."""
    return Schedule(redis_client, QUEUES)


def _scheduled(connection: Connection, client: redis.Redis, settings: RelaySettings, *delays: float) -> list[float]:
    """Hands rows over and returns the times when they are due."""
    for delay in delays:
        connection.execute(
            "INSERT INTO outbox (task, payload, run_at) VALUES ('t', '{}', now() + make_interval(secs => %s))", [delay]
        )
    publish(connection, client, "default", settings)
    rows = connection.execute("SELECT extract(epoch FROM run_at)::float8 AS at FROM outbox ORDER BY id").fetchall()
    return [row["at"] for row in rows]


def _queued(client: redis.Redis, queue: str = "default") -> list[Any]:
    return client.lrange(f"rq:queue:{queue}", 0, -1)


def test_a_job_is_moved_at_its_time_and_not_before(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings, schedule: Schedule
) -> None:
    """Before its time it stays, and the caller gets that time; at its time it is a queued job."""
    first, second = _scheduled(connection, redis_client, relay_settings, 10, 20)
    assert schedule.move_due(first - 0.001) == first
    assert _queued(redis_client) == []
    assert schedule.move_due(first) == second
    assert _queued(redis_client) == [b"1-1"]
    assert Job.fetch("1-1", connection=redis_client, serializer=JSONSerializer).get_status() == "queued"
    assert schedule.move_due(second + 1) is None
    assert _queued(redis_client) == [b"1-1", b"2-1"]
    assert schedule.move_due(second + 2) is None
    assert _queued(redis_client) == [b"1-1", b"2-1"]


def test_any_number_is_moved_at_once(redis_client: redis.Redis, schedule: Schedule) -> None:
    """More jobs than one batch are due at the same time."""
    with redis_client.pipeline() as pipeline:
        for row in range(1, 1301):
            pipeline.hset(f"rq:job:{row}-1", "origin", "default")
            pipeline.zadd(SCHEDULED_JOBS, {f"{row}-1": row})
        pipeline.execute()
    assert schedule.move_due(5000) is None
    assert len(_queued(redis_client)) == 1300


@pytest.mark.parametrize(("foreign", "moved"), [([], 0), (["not an id of ours"], 2)])
def test_a_full_redis_moves_all_jobs_or_none(own_redis: EmbeddedServer, foreign: list[str], moved: int) -> None:
    """The script fails at its first write or not at all: once a key is freed, it may write past `maxmemory`."""
    with redis_connection.connect(own_redis.url, "test") as client:
        for row in (1, 2):
            client.hset(f"rq:job:{row}-1", "origin", "default")
            client.zadd(SCHEDULED_JOBS, {f"{row}-1": row})
        client.zadd(SCHEDULED_JOBS, dict.fromkeys(foreign, 0) | {"3-1": 5000})
        client.config_set("maxmemory", 1)
        with suppress(redis.RedisError):
            Schedule(client, QUEUES).move_due(1000)
        assert len(_queued(client)) == moved
        assert client.zcount(SCHEDULED_JOBS, 1, 2) == 2 - moved


def test_hostile_members_stop_nothing(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings, schedule: Schedule
) -> None:
    """Garbage, huge ids, keys of a wrong type and lost hashes are dropped, each with a line."""
    (at,) = _scheduled(connection, redis_client, relay_settings, 5)
    redis_client.set("rq:job:7-1", "a string")
    redis_client.rpush("rq:job:8-1", "a list")
    redis_client.hset("rq:job:10-1", "status", "no origin")
    redis_client.hset("rq:job:not-ours", "data", "no origin")
    hostile: dict[Any, float] = {
        b"x" * 10_000_000: 1,
        b"\xff\x00'\n": 2,
        b"": 3,
        "*": 4,
        "7-1": 5,
        "8-1": 6,
        "10-1": 8,
        "11-1": 9,
        "not-ours": float("-inf"),
        "9" * 400 + "-1": 10,
    }
    redis_client.zadd(SCHEDULED_JOBS, hostile)
    with capture_logs() as lines:
        assert schedule.move_due(at) is None
    assert _queued(redis_client) == [b"1-1"]
    assert redis_client.zcard(SCHEDULED_JOBS) == 0
    assert redis_client.keys("rq:queue:*") == [b"rq:queue:default"]
    dropped = [line["job"] for line in lines if line["event"] == "dropped job"]
    assert len(dropped) == len(hostile)
    assert max(map(len, dropped)) < 500


def test_a_hostile_member_in_the_future_changes_no_pace(redis_client: redis.Redis, schedule: Schedule) -> None:
    """A score of infinity is a time that never comes."""
    redis_client.zadd(SCHEDULED_JOBS, {"x": float("inf")})
    assert schedule.move_due(time.time()) == float("inf")


def test_the_script_is_loaded_again_after_a_restart(redis_client: redis.Redis, schedule: Schedule) -> None:
    """A Redis that has lost its scripts gets them again."""
    schedule.move_due(0)
    redis_client.script_flush()
    assert schedule.move_due(0) is None


def test_the_relays_own_clock_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock runs on from Postgres' last time by the monotonic clock."""
    passed = 100.0
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: passed)
    clock = Clock()
    clock.set(5_000_000.0)
    passed += 7.5
    assert clock.now() == 5_000_007.5
    clock.set(4_000_000.0)
    assert clock.now() == 4_000_000.0


def test_the_clock_is_never_early(connection: Connection) -> None:
    """Its time is at most the time that Postgres returns afterwards."""
    clock = Clock()

    def postgres_time() -> float:
        row = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8 AS now").fetchone()
        assert row is not None
        return float(row["now"])

    clock.set(postgres_time())
    for _ in range(100):
        assert clock.now() <= postgres_time() + 0.0005
    assert eventually(lambda: clock.now() > postgres_time() - 1, 2)
