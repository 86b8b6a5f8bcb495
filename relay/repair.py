"""Making sure that Redis can serve: it takes writes, and no stranger's key stands where one of ours belongs."""

import redis
from rq.queue import Queue
from rq.worker_registration import REDIS_WORKER_KEYS, WORKERS_BY_QUEUE_KEY

from outbox import installation, logs
from outbox.jobs import intermediate_key, queue_key
from relay.schedule import SCHEDULED_JOBS

CANARY = "outbox:canary"


def repair(client: redis.Redis, queues: list[str]) -> None:
    """Writes once, and deletes keys whose type would fail every command of ours; the sweep restores what they held.

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
