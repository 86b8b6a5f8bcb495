"""Checks that Redis takes writes, and deletes foreign keys with the names of ours."""

import redis
from rq.queue import Queue
from rq.worker_registration import REDIS_WORKER_KEYS, WORKERS_BY_QUEUE_KEY

from outbox.rq_jobs import intermediate_key, queue_key
from outbox.runtime import installation, logs
from outbox_relay.schedule import SCHEDULED_JOBS

CANARY = "outbox:canary"


# No id of RQ's is that long. One run of the script looks at a part of the key, so that Redis can serve others between.
_DROP_LONG = """
local key, first, last = KEYS[1], ARGV[1], ARGV[2]
local is_set = redis.call('TYPE', key).ok == 'zset'
local ids = redis.call(is_set and 'ZRANGE' or 'LRANGE', key, first, last)
local dropped = 0
for _, id in ipairs(ids) do
    if #id > 1000 then
        if is_set then redis.call('ZREM', key, id) else redis.call('LREM', key, 1, id) end
        dropped = dropped + 1
    end
end
return {#ids, dropped}
"""

_PART = 500
"""Ids that one run of the script looks at."""


def drop_long_ids(client: redis.Redis, keys: list[str]) -> None:
    """Drops ids that are too long for a client to read from lists and sorted sets.

    Raises:
        redis.RedisError: Redis is away.
    """
    script = client.register_script(_DROP_LONG)
    for key in keys:
        first = dropped = 0
        while True:
            found, gone = script(keys=[key], args=[first, first + _PART - 1])
            dropped += gone
            first += found - gone
            if not found:
                break
        if dropped:
            logs.get().warning("dropped long ids", key=key, ids=dropped, why="no job has an id of that length")


def repair(client: redis.Redis, queues: list[str]) -> None:
    """Writes a canary, and deletes keys of a type that makes our commands fail; the sweep restores the jobs.

    Raises:
        redis.RedisError: Redis is away, read-only or out of memory.
    """
    kinds = {
        installation.KEY: b"string",
        SCHEDULED_JOBS: b"zset",
        Queue.redis_queues_keys: b"set",
        REDIS_WORKER_KEYS: b"set",
    }
    for name in queues:
        key = queue_key(name)
        kinds |= {key: b"list", intermediate_key(name): b"list", WORKERS_BY_QUEUE_KEY % name: b"set"}
    pipeline = client.pipeline(transaction=False)
    pipeline.set(CANARY, 1, ex=60)
    for key in kinds:
        pipeline.type(key)
    _, *found = pipeline.execute()
    for (key, kind), actual in zip(kinds.items(), found, strict=True):
        if actual not in (kind, b"none"):
            client.delete(key)
            logs.get().warning("deleted key", key=key, why=f"it was a {actual.decode()}, not a {kind.decode()}")
