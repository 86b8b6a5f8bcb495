"""Very long elements that a foreign client wrote in place of ids: no process reads one as a whole."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from outbox.rq_jobs import Delivery
from outbox.runtime import redis_connection
from outbox.runtime.foreign_jobs import aside_key
from outbox.runtime.settings import RelaySettings
from outbox_relay.schedule import SCHEDULED_JOBS, Schedule
from outbox_relay.sweep import Sweep
from outbox_worker.queues import Queues
from tests.conftest import Connection
from tests.support.rows import add_row

LIMIT = 1_000_000
LONG = b"x" * 3 * LIMIT
QUEUE = "rq:queue:default"


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers the limit, so that elements over it are written fast."""
    monkeypatch.setattr(redis_connection, "LONGEST_ELEMENT", LIMIT)


def test_a_reply_is_limited_by_its_longest_element(redis_client: redis.Redis) -> None:
    """Not by their number. The client goes on with another connection."""
    for _ in range(30):
        redis_client.rpush(QUEUE, *([b"y" * 1000] * 200))
    assert len(redis_client.lrange(QUEUE, 0, -1)) == 6000
    redis_client.set("key", LONG)
    with pytest.raises(redis_connection.TooLongError):
        redis_client.get("key")
    assert redis_client.strlen("key") == len(LONG)
    redis_client.set("key", LONG[: LIMIT - 1000])
    assert redis_client.get("key") == LONG[: LIMIT - 1000]


def test_a_worker_that_waits_drops_it_unread(redis_client: redis.Redis) -> None:
    """One line is logged, and the next job is taken."""
    queues = Queues(redis_client, {"default": 1})
    redis_client.rpush(QUEUE, LONG, "1-1")
    with capture_logs() as lines:
        assert queues.wait() == []
        assert queues.wait() == [Delivery(1, 1)]
    assert [(line["event"], line["job"]) for line in lines] == [("dropped job", "(over 1000000 bytes)")]


@pytest.mark.parametrize("element", [LONG, b"9" * len(LONG), b"9" * len(LONG) + b"-1"], ids=["x", "9", "9-1"])
def test_a_take_and_a_move_drop_it_at_the_server(redis_client: redis.Redis, element: bytes) -> None:
    """Such an id is neither looked up nor put aside."""
    redis_client.rpush(QUEUE, element, "1-1")
    redis_client.zadd(SCHEDULED_JOBS, {element: 0})
    with capture_logs() as lines:
        assert Queues(redis_client, {"default": 1}).take(9) == [Delivery(1, 1)]
        Schedule(redis_client, ["default"]).move_due(time.time())
    assert [line["event"] for line in lines] == ["dropped job"] * 2
    assert max(len(line["job"]) for line in lines) < 200
    assert redis_client.zcard(SCHEDULED_JOBS) == redis_client.llen(QUEUE) == 0


def test_foreign_jobs_with_long_ids_are_not_kept(redis_client: redis.Redis) -> None:
    """Ids of up to 1,000 bytes are put aside: 100,000 of them take 100 MB."""
    for length in (1000, 1001):
        redis_client.hset(f"rq:job:{'a' * length}", "origin", "default")
        redis_client.rpush(QUEUE, "a" * length)
    assert Queues(redis_client, {"default": 1}).take(9) == []
    assert redis_client.lrange(aside_key(QUEUE), 0, -1) == [b"a" * 1000]


PLACES: dict[str, Callable[[redis.Redis], Any]] = {
    "queue": lambda client: client.rpush(QUEUE, LONG, "9-9", LONG),
    "intermediate": lambda client: client.rpush(f"{QUEUE}:intermediate", *["8-8"] * 1200, LONG),
    "set": lambda client: client.zadd(SCHEDULED_JOBS, dict.fromkeys([LONG, b"foreign"], time.time() + 1000)),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_sweep_drops_it_and_goes_on(
    connection: Connection, redis_client: redis.Redis, relay_settings: RelaySettings, place: str
) -> None:
    """It would read the element at every sweep. Short ids stay, and the next sweep takes back the lost row."""
    row_id = add_row(connection).row_id
    connection.execute("UPDATE outbox SET enqueued_at = now() - interval '1 min'")
    PLACES[place](redis_client)
    sweep = Sweep(redis_client, relay_settings)
    with capture_logs() as lines:
        assert sweep.look(connection) == 0
        assert sweep.look(connection) == 1
        assert sweep.take_back(connection) == 1
    assert connection.execute("SELECT id FROM outbox WHERE status = 'pending'").fetchall() == [{"id": row_id}]
    (line,) = [line for line in lines if line["event"] == "dropped long ids"]
    assert (line["ids"], line["log_level"]) == (2 if place == "queue" else 1, "warning")
    left = [redis_client.lrange(QUEUE, 0, -1), redis_client.lrange(f"{QUEUE}:intermediate", 0, -1)]
    assert [len(left[0]), len(left[1]), redis_client.zcard(SCHEDULED_JOBS)] == {
        "queue": [1, 0, 0],
        "intermediate": [0, 1200, 0],
        "set": [0, 0, 1],
    }[place]
