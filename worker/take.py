"""Taking job ids out of RQ's queues, weighted so that no queue starves."""

import random
from collections.abc import Mapping

import redis
from rq.job import Job
from rq.queue import Queue
from rq.suspension import WORKERS_SUSPENDED

from outbox import logs
from outbox.jobs import Delivery
from outbox.redis import BLOCK

# One round trip for any number of jobs. Each queue first gives up to its share, then what shares left over is
# taken in the same order. The jobs' hashes go with their ids: what they say is in Postgres too, and truer there.
_TAKE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return {1, {}} end
local taken, left = {}, tonumber(ARGV[1])
local function take(key, count)
    for _ = 1, math.min(count, left) do
        local id = redis.call('LPOP', key)
        if not id then return end
        if string.match(id, '^%d+%-%d+$') then redis.call('DEL', ARGV[2] .. id) end
        taken[#taken + 1] = string.sub(id, 1, 100)
        left = left - 1
    end
end
for i = 2, #KEYS do take(KEYS[i], tonumber(ARGV[i + 1])) end
for i = 2, #KEYS do take(KEYS[i], left) end
return {0, taken}
"""


class Suspended(Exception):  # noqa: N818 - a state, not an error
    """`rq suspend` has told all workers to pause."""


class Queues:
    """RQ's queues, as one worker takes from them."""

    def __init__(self, client: redis.Redis, weights: Mapping[str, int]) -> None:
        self._client = client
        self._weights = dict(weights)
        self._take = client.register_script(_TAKE)

    def take(self, count: int) -> list[Delivery]:
        """Takes up to `count` jobs without waiting.

        Raises:
            Suspended: workers are to pause.
            redis.RedisError: Redis is away.
        """
        order = weighted_order(self._weights)
        shares = dict(shares_of(count, self._weights, order))
        suspended, job_ids = self._take(
            keys=[WORKERS_SUSPENDED, *map(_key, order)],
            args=[count, Job.redis_job_namespace_prefix, *(shares[name] for name in order)],
        )
        if suspended:
            raise Suspended
        return _ours(job_ids)

    def wait(self) -> list[Delivery]:
        """Waits up to `redis.BLOCK` seconds for a job and takes it.

        BLPOP hands the id to a connection that may be gone by then. Such a row is swept and handed over again.

        Raises:
            redis.RedisError: Redis is away.
        """
        popped = self._client.blpop([_key(name) for name in weighted_order(self._weights)], timeout=BLOCK)
        return _ours([popped[1][:100]]) if popped else []


def weighted_order(weights: Mapping[str, int], draw: random.Random | None = None) -> list[str]:
    """Returns the queues in random order, heavier ones first more often: with 10 : 5, two times in three.

    Args:
        weights: each queue's weight.
        draw: where the chance comes from.
    """
    uniform = (draw or random).uniform
    # Efraimidis and Spirakis, Weighted random sampling with a reservoir (2006): sort by u^(1/w), largest first.
    return sorted(weights, key=lambda name: uniform(0, 1) ** (1 / weights[name]), reverse=True)


def shares_of(count: int, weights: Mapping[str, int], order: list[str]) -> list[tuple[str, int]]:
    """Splits `count` among the queues by weight; what does not divide goes to the first in `order`."""
    total = sum(weights.values())
    shares = {name: count * weights[name] // total for name in order}
    for name in order[: count - sum(shares.values())]:
        shares[name] += 1
    return list(shares.items())


def _key(queue: str) -> str:
    return f"{Queue.redis_queue_namespace_prefix}{queue}"


def _ours(job_ids: list[bytes]) -> list[Delivery]:
    deliveries = []
    for job_id in job_ids:
        if delivery := Delivery.parse(job_id):
            deliveries.append(delivery)
        else:
            logs.get().warning("dropped job", job=repr(job_id), why="no job of ours has this id")
    return deliveries
