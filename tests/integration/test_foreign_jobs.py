"""An application's own RQ on the same Redis database: our processes lose none of its jobs."""

import operator
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue, SimpleWorker
from rq.job import Job, JobStatus
from rq_scheduler import Scheduler
from structlog.testing import capture_logs

from outbox.devstack.embedded import EmbeddedServer
from outbox.rq_jobs import Delivery
from outbox.runtime import redis_connection
from outbox.runtime.foreign_jobs import aside_key
from outbox.runtime.settings import RelaySettings
from outbox_relay.publish import publish
from outbox_relay.schedule import SCHEDULED_JOBS, Schedule
from outbox_worker.queues import Queues
from tests.conftest import Connection
from tests.support.rows import offer

ASIDE = aside_key("rq:queue:default")
SCHEDULED_ASIDE = aside_key(SCHEDULED_JOBS)


@pytest.fixture
def queues(redis_client: redis.Redis) -> Queues:
    """The queues of a worker."""
    return Queues(redis_client, {"critical": 10, "default": 5})


@pytest.fixture
def schedule(redis_client: redis.Redis) -> Schedule:
    """The schedule of a relay."""
    return Schedule(redis_client, ["critical", "default"])


@pytest.fixture
def their_scheduler(redis_client: redis.Redis) -> Scheduler:
    """The application's own rq-scheduler."""
    return Scheduler("app", connection=redis_client)


def enqueue(client: redis.Redis, count: int, **options: Any) -> list[bytes]:
    """Enqueues an application's jobs in a queue with the name of one of ours, and returns their ids."""
    queue = Queue("default", connection=client)
    return [queue.enqueue(operator.add, 1, number, **options).id.encode() for number in range(count)]


def take(queues: Queues) -> list[Delivery]:
    """Takes jobs as a busy worker does: many at a time."""
    return queues.take(10)


def wait(queues: Queues) -> list[Delivery]:
    """Takes jobs as an idle worker does: one at a time."""
    return [delivery for _ in range(8) for delivery in queues.wait()]


@pytest.mark.parametrize("way", [take, wait])
def test_jobs_in_a_queue_of_ours_are_put_aside(
    redis_client: redis.Redis, queues: Queues, way: Callable[[Queues], list[Delivery]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are kept unchanged and in order under a key that is logged once with the remedy.

    After the command that the docs name, they run.
    """
    monkeypatch.setattr("outbox_worker.queues.BLOCK", 0.05)
    theirs = enqueue(redis_client, 5)
    offer(redis_client, "1-1", "2-1")
    with capture_logs() as lines:
        assert way(queues) == [Delivery(1, 1), Delivery(2, 1)]
    assert redis_client.lrange(ASIDE, 0, -1) == theirs
    (line,) = lines
    assert (line["event"], line["log_level"], line["kept_in"]) == ("foreign job put aside", "error", ASIDE)
    assert "REDIS_URL" in line["remedy"]

    documented = re.search(r'redis-cli EVAL "(.+)"', Path("docs/deploy.md").read_text(encoding="utf-8"))
    assert documented
    assert redis_client.eval(documented[1], 2, ASIDE, "rq:queue:default") == 5
    SimpleWorker(["default"], connection=redis_client).work(burst=True)
    ran = [Job.fetch(job.decode(), connection=redis_client) for job in theirs]
    assert [(job.get_status(), job.return_value()) for job in ran] == [(JobStatus.FINISHED, n + 1) for n in range(5)]


def test_the_number_of_kept_jobs_is_limited(
    redis_client: redis.Redis, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first jobs are kept, and each job that is lost is logged."""
    monkeypatch.setattr("outbox_worker.queues.MAX_KEPT", 3)
    theirs = enqueue(redis_client, 5)
    with capture_logs() as lines:
        queues.take(10)
    assert redis_client.lrange(ASIDE, 0, -1) == theirs[:3]
    lost = [line for line in lines if line["event"] == "dropped job"]
    assert [(line["job"], line["why"]) for line in lost] == [(repr(job), f"{ASIDE} is full") for job in theirs[3:]]


def test_jobs_that_cannot_be_put_aside_do_not_delay_others(redis_client: redis.Redis, queues: Queues) -> None:
    """Their list is a key of another type: they are dropped and logged, and our jobs are taken."""
    redis_client.set(ASIDE, "a string")
    (theirs,) = enqueue(redis_client, 1)
    offer(redis_client, "1-1")
    with capture_logs() as lines:
        assert queues.take(10) == [Delivery(1, 1)]
    assert [(line["event"], line["job"]) for line in lines] == [("dropped job", repr(theirs))]


def test_a_full_redis_loses_no_foreign_job(own_redis: EmbeddedServer) -> None:
    """A job that an idle worker has popped is put aside as soon as Redis accepts writes."""
    with redis_connection.connect(own_redis.url, "test") as client:
        queues = Queues(client, {"default": 1})
        theirs = enqueue(client, 2)
        client.config_set("maxmemory", 1)
        with pytest.raises(redis.RedisError):
            queues.wait()
        for _ in range(2):
            with pytest.raises(redis.RedisError):
                queues.take(10)
        client.config_set("maxmemory", 0)
        queues.take(10)
        assert client.lrange(ASIDE, 0, -1) == theirs


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")  # by rq-scheduler itself
def test_scheduled_jobs_are_left_alone(
    connection: Connection,
    redis_client: redis.Redis,
    relay_settings: RelaySettings,
    schedule: Schedule,
    their_scheduler: Scheduler,
) -> None:
    """Foreign jobs stay in rq-scheduler's set, due or not; the application's own rq-scheduler moves them.

    Our jobs behind them are moved. The log has one line with the remedy: a database of our own.
    """
    now = datetime.now(UTC)
    hourly = their_scheduler.schedule(
        now.replace(tzinfo=None) - timedelta(seconds=30), operator.add, [1, 2], interval=3600
    )
    once = their_scheduler.enqueue_at(now.replace(tzinfo=None) - timedelta(seconds=20), operator.add, 1, 2)
    later = their_scheduler.enqueue_at(now.replace(tzinfo=None) + timedelta(hours=1), operator.add, 1, 2)
    before = redis_client.zrange(SCHEDULED_JOBS, 0, -1, withscores=True)
    connection.execute("INSERT INTO outbox (task, payload, run_at) VALUES ('t', '{}', now() + interval '10 s')")
    publish(connection, redis_client, "default", relay_settings)
    with capture_logs() as lines:
        for _ in range(3):
            upcoming = schedule.move_due(now.timestamp() + 60)
    assert redis_client.lrange("rq:queue:default", 0, -1) == [b"1-1"]
    assert redis_client.zrange(SCHEDULED_JOBS, 0, -1, withscores=True) == before
    assert upcoming == redis_client.zscore(SCHEDULED_JOBS, later.id), "it is not woken by foreign jobs that are due"
    (line,) = lines
    assert (line["event"], line["log_level"], line["key"]) == ("foreign job left alone", "error", SCHEDULED_JOBS)
    assert "REDIS_URL" in line["remedy"]

    their_scheduler.enqueue_jobs()
    assert sorted(redis_client.lrange("rq:queue:app", 0, -1)) == sorted([hourly.id.encode(), once.id.encode()])
    assert redis_client.zcount(SCHEDULED_JOBS, now.timestamp() + 3000, now.timestamp() + 4000) == 2, "hourly and later"


def test_many_foreign_jobs_in_the_set_do_not_hide_ours(
    redis_client: redis.Redis, schedule: Schedule, their_scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many foreign jobs are due, ours are moved. Those beyond the limit of a look are put aside."""
    monkeypatch.setattr("outbox_relay.schedule.LEFT", 700)
    with redis_client.pipeline() as pipeline:
        for number in range(1300):
            pipeline.hset(f"rq:job:theirs-{number}", "origin", "app")
            pipeline.zadd(SCHEDULED_JOBS, {f"theirs-{number}": number})
        for number in range(1, 4):
            pipeline.hset(f"rq:job:{number}-1", "origin", "default")
            pipeline.zadd(SCHEDULED_JOBS, {f"{number}-1": 2000})
        pipeline.execute()
    for _ in range(2):
        assert schedule.move_due(5000) is None
    assert redis_client.lrange("rq:queue:default", 0, -1) == [b"1-1", b"2-1", b"3-1"]
    kept = redis_client.zrange(SCHEDULED_JOBS, 0, -1, withscores=True)
    aside = redis_client.zrange(SCHEDULED_ASIDE, 0, -1, withscores=True)
    assert (len(kept), len(aside)) == (700, 600)
    assert kept + aside == [(f"theirs-{number}".encode(), float(number)) for number in range(1300)]
    redis_client.zunionstore(SCHEDULED_JOBS, [SCHEDULED_JOBS, SCHEDULED_ASIDE], aggregate="MAX")
    assert redis_client.zrange(SCHEDULED_JOBS, 0, -1, withscores=True) == kept + aside, "given back as the docs say"


def test_another_relays_jobs_are_left_alone(redis_client: redis.Redis, schedule: Schedule) -> None:
    """A row's job in a queue that this relay does not know stays and is not logged: another relay moves it."""
    redis_client.hset("rq:job:9-1", "origin", "newer")
    redis_client.zadd(SCHEDULED_JOBS, {"9-1": 5})
    with capture_logs() as lines:
        assert schedule.move_due(1000) is None
    assert lines == []
    assert Schedule(redis_client, ["newer"]).move_due(1000) is None
    assert redis_client.lrange("rq:queue:newer", 0, -1) == [b"9-1"]


def test_a_hand_over_overwrites_no_foreign_job(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings
) -> None:
    """Of RQ's job keys, the relay writes only those of its rows."""
    theirs = ["template", "canary", "outbox", "0-0"]
    before = {name: enqueue_as(redis_client, name) for name in theirs}
    connection.execute("INSERT INTO outbox (task, payload) VALUES ('t', '{}')")
    publish(connection, redis_client, "default", relay_settings)
    assert {name: redis_client.hgetall(f"rq:job:{name}") for name in theirs} == before


def enqueue_as(client: redis.Redis, name: str) -> Any:
    """Enqueues a foreign job with this id and returns its hash."""
    Queue("app", connection=client).enqueue(operator.add, 1, 2, job_id=name)
    return client.hgetall(f"rq:job:{name}")
