"""Rows are published to Redis: what Redis then holds, and what happens if it refuses."""

import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier
from typing import Any

import psycopg
import pytest
import redis
from rq.job import Job
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq_scheduler import Scheduler
from structlog.testing import capture_logs

from outbox.devstack.embedded import EmbeddedServer, embedded_redis
from outbox.rq_jobs import OutboxJob, deliver
from outbox.runtime import logs, postgres, redis_connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.publish import HASH_TTL, publish

Connection = psycopg.Connection[dict[str, Any]]


def _add(connection: Connection, count: int = 1, queue: str = "default", delay: float = 0) -> None:
    connection.execute(
        "INSERT INTO outbox (task, payload, queue, run_at, timeout) SELECT 'tell', '{\"secret\": \"hunter2\"}', %s,"
        " now() + make_interval(secs => %s), 7 FROM generate_series(1, %s)",
        [queue, delay, count],
    )


def _rows(connection: Connection) -> list[dict[str, Any]]:
    return connection.execute("SELECT * FROM outbox ORDER BY id").fetchall()


def _count(connection: Connection, status: str, queue: str = "default") -> int:
    found = connection.execute(
        "SELECT count(*) AS rows FROM outbox WHERE status = %s AND queue = %s", [status, queue]
    ).fetchone()
    assert found is not None
    return int(found["rows"])


def _with(settings: RelaySettings, **changes: Any) -> RelaySettings:
    return settings.model_copy(update=changes)


def _queue(client: redis.Redis, name: str = "default") -> Queue:
    return Queue(name, connection=client, serializer=JSONSerializer)


def test_payloads_stay_in_postgres(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """A large payload is not read; the log line shows its size. Of a smaller one it shows the beginning."""
    connection.execute(
        "INSERT INTO outbox (task, payload) SELECT 'tell', jsonb_build_object('text', repeat('x', length))"
        " FROM unnest(ARRAY[1000000, 5000]) AS length"
    )
    with capture_logs() as lines:
        assert publish(connection, redis_client, "default", relay_settings) == 2
    assert re.fullmatch(r"\(\d{5} bytes\)", lines[0]["payload"])
    assert lines[1]["payload"] == '{"text": "' + "x" * (logs.PAYLOAD_LIMIT - 10)


def test_a_due_row_is_a_job_like_rqs_own(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """RQ's tools read it, and its hash has the same fields that RQ writes."""
    _add(connection)
    with capture_logs() as lines:
        assert publish(connection, redis_client, "default", relay_settings) == 1

    (row,) = _rows(connection)
    assert (row["status"], row["delivery"]) == ("enqueued", 1)
    assert row["enqueued_at"] is not None
    job_id = f"{row['id']}-1"
    assert _queue(redis_client).get_job_ids() == [job_id]
    assert [queue.name for queue in Queue.all(connection=redis_client)] == ["default"]
    job = Job.fetch(job_id, connection=redis_client, serializer=JSONSerializer)
    assert (job.func, job.args, job.kwargs) == (deliver, [row["id"], 1], {})
    assert (job.origin, job.timeout, job.result_ttl, job.get_status()) == ("default", 7, 0, "queued")

    reference = _queue(redis_client, "default").enqueue(
        deliver, row["id"], 1, job_timeout=7, result_ttl=0, description=f"tell (row {row['id']}, delivery 1)"
    )
    ours, rqs = (dict[Any, Any](redis_client.hgetall(each.key)) for each in (job, reference))
    assert JSONSerializer.loads(ours.pop(b"data")) == JSONSerializer.loads(zlib.decompress(rqs.pop(b"data")))
    for fields in (ours, rqs):
        for moment in (b"created_at", b"enqueued_at"):
            assert abs(datetime.now(UTC) - datetime.fromisoformat(fields.pop(moment).decode())).total_seconds() < 10
    assert ours == rqs
    assert 0 < redis_client.ttl(job.key) <= HASH_TTL
    assert set(redis_client.keys("rq:job:*")) == {job.key.encode(), reference.key.encode()}

    (line,) = [line for line in lines if line["event"] == "enqueued task"]
    assert (line["type"], line["queue"], line["max_retry"], line["row"], line["delivery"]) == (
        "tell",
        "default",
        25,
        row["id"],
        1,
    )


def test_redis_holds_no_payload_and_no_code(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """A dump of Redis shows row numbers in JSON: no payload, and nothing that unpickling would run."""
    _add(connection)
    _add(connection, delay=30)
    publish(connection, redis_client, "default", relay_settings)
    keys = redis_client.keys("rq:job:*")
    assert len(keys) == 2
    for key in keys:
        fields: dict[Any, Any] = redis_client.hgetall(key)
        assert fields[b"data"].startswith(b'["outbox.rq_jobs.deliver",')
        everything = b"".join(fields.values())
        assert b"hunter2" not in everything
        assert b"\x80" not in everything


def test_a_payload_that_python_cannot_read_is_handed_over(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """Postgres stores numbers of any length, Python reads 4,300 digits: the log line has the beginning of the text."""
    connection.execute("""INSERT INTO outbox (task, payload) VALUES ('tell', '{"n": 1e5000}')""")
    with capture_logs() as lines:
        assert publish(connection, redis_client, "default", relay_settings) == 1
    assert lines[0]["payload"] == '{"n": 1' + "0" * (logs.PAYLOAD_LIMIT - 7)


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning")  # rq-scheduler's own
def test_a_row_that_is_not_due_is_scheduled(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """rq-scheduler's own tools list it with its time; it is in no queue yet."""
    _add(connection, delay=30)
    publish(connection, redis_client, "default", relay_settings)
    (row,) = _rows(connection)
    scheduler = Scheduler(connection=redis_client, job_class=OutboxJob)
    ((job, at),) = scheduler.get_jobs(with_times=True)
    assert job.id == f"{row['id']}-1"
    assert abs(at.replace(tzinfo=UTC) - row["run_at"].astimezone(UTC)).total_seconds() < 0.001
    assert isinstance(at, datetime)
    assert _queue(redis_client).get_job_ids() == []
    assert row["status"] == "enqueued"


def test_a_row_that_is_younger_than_the_relays_transaction_is_due(
    connection: Connection, database_url: str, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """It was added after the transaction's start, which is its now(), and before the statement."""
    with postgres.connect(database_url, "relay") as relays, relays.transaction():
        relays.execute("SELECT now()")
        _add(connection)
        assert publish(relays, redis_client, "default", relay_settings) == 1
    assert _queue(redis_client).job_ids == ["1-1"]


def test_rows_beyond_the_horizon_stay_in_postgres(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """A row that is due in an hour is not handed over yet."""
    _add(connection, delay=61)
    assert publish(connection, redis_client, "default", relay_settings) == 0
    assert publish(connection, redis_client, "default", _with(relay_settings, horizon=120)) == 1


def test_a_batch_goes_in_the_order_of_its_time(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """The row that has waited longest is first."""
    for delay in (-1, -3, -2):
        _add(connection, delay=delay)
    publish(connection, redis_client, "default", relay_settings)
    assert _queue(redis_client).get_job_ids() == ["2-1", "3-1", "1-1"]


def test_each_queue_has_its_own_window(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """A flood in `default` fills that queue's window only; `critical` is handed over."""
    settings = _with(relay_settings, window=10, batch=4)
    _add(connection, 50)
    _add(connection, 3, "critical")
    assert [publish(connection, redis_client, "default", settings) for _ in range(4)] == [4, 4, 2, 0]
    assert publish(connection, redis_client, "critical", settings) == 3
    connection.execute("UPDATE outbox SET status = 'done', done_at = now() WHERE id = 1")
    assert publish(connection, redis_client, "default", settings) == 1


def test_rows_that_are_not_due_leave_room_for_those_that_are(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """A flood of rows that are due in a minute does not delay a row that is due now."""
    settings = _with(relay_settings, window=20, batch=5)
    _add(connection, 50, delay=50)
    while publish(connection, redis_client, "default", settings):
        pass
    assert redis_client.zcard("rq:scheduler:scheduled_jobs") in range(10, 15)
    _add(connection, 3)
    assert publish(connection, redis_client, "default", settings) == 3
    assert _queue(redis_client).get_job_ids() == ["51-1", "52-1", "53-1"]


def test_publishers_side_by_side_hand_no_row_over_twice(
    database_url: str, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """Four publishers hand over 2,000 rows, each once."""
    settings = _with(relay_settings, batch=50)
    barrier = Barrier(4)

    def run() -> int:
        with postgres.connect(database_url, "test") as own:
            barrier.wait(10)
            total = 0
            misses = 0
            while misses < 3:
                handed = publish(own, redis_client, "default", settings)
                total += handed
                misses += not handed
            return total

    with postgres.connect(database_url, "test") as connection:
        _add(connection, 2000)
        with ThreadPoolExecutor(4) as threads:
            assert sum(future.result(30) for future in [threads.submit(run) for _ in range(4)]) == 2000
        assert {row["delivery"] for row in _rows(connection)} == {1}
    assert sorted(_queue(redis_client).get_job_ids()) == sorted(f"{row}-1" for row in range(1, 2001))


@pytest.mark.parametrize("kind", ["string", "list", "hash"])
def test_a_foreign_key_under_a_jobs_name_is_replaced(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings, kind: str
) -> None:
    """A key of any type under the job's name is replaced."""
    _add(connection, 2)
    key = "rq:job:1-1"
    if kind == "string":
        redis_client.set(key, b"x" * 1000)
    elif kind == "list":
        redis_client.rpush(key, "x")
    else:
        redis_client.hset(key, mapping={"dependency_id": "x", "allow_dependency_failures": "1"})
    assert publish(connection, redis_client, "default", relay_settings) == 2
    assert b"dependency_id" not in redis_client.hgetall(key)
    assert _queue(redis_client).get_job_ids() == ["1-1", "2-1"]


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A Redis whose settings a test may break."""
    with embedded_redis(tmp_path_factory.mktemp("own_redis")) as server:
        yield server


@pytest.mark.parametrize(
    ("breakage", "repair"),
    [
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
        ("CONFIG SET min-replicas-to-write 1", "CONFIG SET min-replicas-to-write 0"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
    ],
)
def test_a_redis_that_takes_no_writes_changes_nothing(
    connection: Connection, own_redis: EmbeddedServer, relay_settings: RelaySettings, breakage: str, repair: str
) -> None:
    """Out of memory, without its replicas, or a replica itself: the rows stay pending and are handed over later."""
    count = 1500  # several scripts in one transaction
    _add(connection, count)
    before = _rows(connection)
    with redis_connection.connect(own_redis.url, "test") as client:
        client.flushall()
        client.execute_command(*breakage.split())
        with pytest.raises(redis.RedisError):
            publish(connection, client, "default", relay_settings)
        assert _rows(connection) == before
        assert client.keys("rq:*") == []
        client.execute_command(*repair.split())
        assert publish(connection, client, "default", relay_settings) == count
    assert {row["delivery"] for row in _rows(connection)} == {1}


def test_a_redis_that_is_gone_changes_nothing(
    connection: Connection, tmp_path: Path, relay_settings: RelaySettings
) -> None:
    """No server listens: the rows stay pending with the delivery they had."""
    _add(connection, 3)
    before = _rows(connection)
    with (
        redis_connection.connect(f"unix://{tmp_path}/none.sock", "test") as client,
        pytest.raises(redis_connection.AWAY),
    ):
        publish(connection, client, "default", relay_settings)
    assert _rows(connection) == before
