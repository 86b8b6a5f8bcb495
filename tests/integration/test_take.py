"""Taking job ids out of RQ's queues: by weight, without a trace, and not while workers are suspended."""

from collections.abc import Callable

import pytest
import redis
from structlog.testing import capture_logs

from outbox.rq_jobs import Delivery
from outbox_worker.queues import Queues, Suspended
from tests.support.rows import offer


def test_a_job_leaves_nothing_behind(redis_client: redis.Redis) -> None:
    """Its hash is deleted with its id, whether the worker takes it at once or waits for it."""
    queues = Queues(redis_client, {"critical": 10, "default": 5})
    takes: list[Callable[[], list[Delivery]]] = [lambda: queues.take(3), queues.wait]
    for take in takes:
        redis_client.hset("rq:job:1-1", "data", "x")
        offer(redis_client, "1-1")
        assert take() == [Delivery(1, 1)]
        assert redis_client.keys("rq:job:*") == []


def test_both_queues_are_taken_by_weight(redis_client: redis.Redis) -> None:
    """Full queues are taken from as 10 : 5, in batches of any size; an empty queue leaves its share to the other."""
    queues = Queues(redis_client, {"critical": 10, "default": 5})
    offer(redis_client, *[f"{n}-1" for n in range(1, 3001)], queue="critical")
    offer(redis_client, *[f"{n}-2" for n in range(1, 3001)], queue="default")
    for count in (1, 2, 4, 15, 32):
        taken = [delivery for _ in range(600 // count) for delivery in queues.take(count)]
        part = sum(delivery.number == 1 for delivery in taken) / len(taken)
        assert part == pytest.approx(2 / 3, abs=0.09), f"{count} at a time"
    redis_client.delete("rq:queue:critical")
    assert len(queues.take(32)) == 32


def test_a_key_of_a_wrong_type_does_not_hide_the_other_queue(redis_client: redis.Redis) -> None:
    """It is deleted and logged, and the other queue is taken from at once."""
    queues = Queues(redis_client, {"critical": 10, "default": 5})
    redis_client.hset("rq:queue:critical", "a", "b")
    offer(redis_client, "1-1")
    with capture_logs() as lines:
        assert queues.take(4) == [Delivery(1, 1)]
    assert [(line["event"], line["key"]) for line in lines] == [("deleted key", "rq:queue:critical")]


def test_a_suspended_worker_takes_nothing(redis_client: redis.Redis) -> None:
    """The jobs stay in their queue."""
    offer(redis_client, "1-1")
    redis_client.set("rq:suspended", 1)
    with pytest.raises(Suspended):
        Queues(redis_client, {"default": 5}).take(4)
    redis_client.delete("rq:suspended")
    assert redis_client.llen("rq:queue:default") == 1
