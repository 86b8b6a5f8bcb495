"""Takes job ids out of RQ's queues, weighted so that no queue starves."""

import random
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

import redis
from rq.job import Job
from rq.suspension import WORKERS_SUSPENDED

from outbox.rq_jobs import IS_JOB_ID, Delivery, queue_key
from outbox.runtime import logs, redis_connection
from outbox.runtime.foreign_jobs import MAX_KEPT, ForeignJobs, aside_key
from outbox.runtime.redis_connection import BLOCK, TooLongError

# One round trip for any number of jobs. Each queue first gives up to its share; then the rest of the room is filled in
# the same order. The hashes of jobs are deleted with their ids: Postgres holds the truth.
# RQ's ids have 36 bytes. An id of over 1,000 bytes is not looked up: it may have a hundred million bytes.
# A foreign job is moved to a list of its own, where its owner finds it; if that fails, the other jobs are still taken.
# A key of another type under a queue's name would fail every take, so it is deleted; the sweep restores the jobs.
_TAKE = """
if redis.call('EXISTS', unpack(KEYS)) == 0 then return {0, {}, {}, {}, {}} end
if redis.call('EXISTS', KEYS[1]) == 1 then return {1, {}, {}, {}, {}} end
local taken, hashes, strange, aside, dropped, left = {}, {}, {}, {}, {}, tonumber(ARGV[1])
local function put_aside(key, id)
    local is_job = #id <= 1000 and redis.pcall('HEXISTS', ARGV[2] .. id, 'origin') == 1
    local kept = is_job and redis.pcall('LLEN', ARGV[3] .. key)
    local to = dropped
    if type(kept) == 'number' and kept < tonumber(ARGV[4]) then
        if type(redis.pcall('RPUSH', ARGV[3] .. key, id)) == 'number' then to = aside end
    end
    to[#to + 1] = {key, string.sub(id, 1, 100), is_job and 1 or 0}
end
local function take(key, count)
    if math.min(count, left) < 1 then return end
    local ids = redis.pcall('LPOP', key, math.min(count, left))
    if not ids then return end
    if ids.err then
        redis.call('DEL', key)
        strange[#strange + 1] = key
        return
    end
    for _, id in ipairs(ids) do
        if is_job_id(id) then
            hashes[#hashes + 1] = ARGV[2] .. id
            taken[#taken + 1] = string.sub(id, 1, 100)
        else
            put_aside(key, id)
        end
    end
    left = left - #ids
end
for i = 2, #KEYS do take(KEYS[i], tonumber(ARGV[i + 3])) end
for i = 2, #KEYS do take(KEYS[i], left) end
for i = 1, #hashes, 1000 do redis.call('DEL', unpack(hashes, i, math.min(i + 999, #hashes))) end
return {0, taken, strange, aside, dropped}
"""


class Suspended(Exception):  # noqa: N818 - a state, not an error
    """All workers are suspended, by `rq suspend` for example."""


class Queues:
    """The RQ queues that one worker takes from."""

    def __init__(self, client: redis.Redis, weights: Mapping[str, int]) -> None:
        self._client = client
        self._weights = dict(weights)
        self._take = client.register_script(IS_JOB_ID + _TAKE)
        self._foreign = ForeignJobs()
        self._to_put_back: tuple[bytes, bytes] | None = None
        """The key of a queue, and an id popped from it that is not ours."""

    def take(self, count: int, names: Collection[str] | None = None) -> list[Delivery]:
        """Takes up to `count` jobs without waiting, from all queues or those in `names`.

        Raises:
            Suspended: all workers are suspended.
            redis.RedisError: Redis is away.
        """
        if self._to_put_back:
            self._client.lpush(*self._to_put_back)
            self._to_put_back = None
        weights = self._weights_of(names)
        order = weighted_order(weights)
        shares = shares_of(count, weights)
        suspended, job_ids, deleted, put_aside, dropped = self._take(
            keys=[WORKERS_SUSPENDED, *map(queue_key, order)],
            args=[count, Job.redis_job_namespace_prefix, aside_key(""), MAX_KEPT, *(shares[name] for name in order)],
        )
        if suspended:
            raise Suspended
        for key in deleted:
            logs.get().warning("deleted key", key=key.decode(), why="it was no list")
        for key, job_id, _ in put_aside:
            self._foreign.log_put_aside(job_id, key.decode())
        for key, job_id, is_job in dropped:
            self._foreign.log_dropped(job_id, is_job=is_job, key=key.decode())
        return _parse(job_ids)

    def wait(self, names: Collection[str] | None = None) -> list[Delivery]:
        """Waits up to `redis_connection.BLOCK` seconds for a job in all queues or those in `names`, and takes it.

        BLPOP may pop an id for a connection that is already lost. The sweep takes such a row back.

        Raises:
            Suspended: all workers are suspended.
            redis.RedisError: Redis is away.
        """
        keys = [queue_key(name) for name in weighted_order(self._weights_of(names))]
        popped: Any = None
        try:
            popped = self._client.blpop(keys, timeout=BLOCK)
        except TooLongError:  # the id is popped: Redis has no command that waits without popping
            job = f"(over {redis_connection.LONGEST_ELEMENT} bytes)"
            logs.get().warning("dropped job", job=job, why="no job has an id of that length")
        if not popped:
            return []
        key, job_id = popped
        if not (delivery := Delivery.parse(job_id)):
            self._to_put_back = key, job_id
            return self.take(1, names)  # this tells a foreign job from garbage
        with suppress(redis.RedisError):  # the hash expires anyway, and a failure here must not lose the job
            self._client.delete(f"{Job.redis_job_namespace_prefix}{delivery.job_id}")
        return [delivery]

    def _weights_of(self, names: Collection[str] | None) -> dict[str, int]:
        return self._weights if names is None else {name: self._weights[name] for name in names}


def weighted_order(weights: Mapping[str, int], draw: random.Random | None = None) -> list[str]:
    """Returns the queues in random order, heavier ones first more often: with weights 10 : 5, two times in three.

    Args:
        weights: each queue's weight.
        draw: the source of randomness.
    """
    uniform = (draw or random).uniform
    # Efraimidis and Spirakis, Weighted random sampling with a reservoir (2006): sort by u^(1/w), largest first.
    return sorted(weights, key=lambda name: uniform(0, 1) ** (1 / weights[name]), reverse=True)


def shares_of(count: int, weights: Mapping[str, int], draw: random.Random | None = None) -> dict[str, int]:
    """Splits `count` among the queues by weight; shares are whole numbers, and exact on average.

    Args:
        count: the number of jobs to split.
        weights: each queue's weight.
        draw: the source of randomness.
    """
    # Systematic sampling: the shares lie end to end on a line, and each queue gets the whole numbers on its own part.
    total = sum(weights.values())
    offset = (draw or random).randrange(total)
    shares, end, before = {}, 0, 0
    for name, weight in weights.items():
        end += weight
        share_end = (count * end + offset) // total
        shares[name] = share_end - before
        before = share_end
    return shares


def _parse(job_ids: Iterable[Any]) -> list[Delivery]:
    deliveries = []
    for job_id in job_ids:
        if delivery := Delivery.parse(job_id):
            deliveries.append(delivery)
        else:  # its numbers are too large
            logs.get().warning("dropped job", job=repr(job_id), why="this is not the id of one of our jobs")
    return deliveries
