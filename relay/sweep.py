"""Taking back rows that Redis has lost: one mechanism for every way in which Redis may forget."""

from typing import Any

import psycopg
import redis
from rq.intermediate_queue import IntermediateQueue
from rq.queue import Queue

from outbox import logs
from outbox.jobs import Delivery
from outbox.queries import query
from outbox.settings import RelaySettings
from relay.schedule import SCHEDULED_JOBS

CANARY = "outbox:sweep"


def sweep(connection: psycopg.Connection[dict[str, Any]], client: redis.Redis, settings: RelaySettings) -> int:
    """Returns `enqueued` rows to `pending` whose job is nowhere in Redis, and returns how many there were.

    Postgres is read first and Redis after: a job that is missing then was popped, lost, or never written. If a
    worker has popped it and is about to claim it, the fence settles that: the row's next delivery wins.

    Raises:
        redis.RedisError: Redis could not be read completely, or takes no writes; nothing is swept.
        psycopg.OperationalError: Postgres is away.
    """
    with connection.transaction():
        locked = connection.execute(query("lock_sweep")).fetchone()
        if not locked or not locked["locked"]:
            return 0
        candidates = connection.execute(query("sweep_candidates"), {"grace": settings.sweep_grace}).fetchall()
        if not candidates:
            return 0
        held = held_deliveries(client, list(settings.queues))
        lost = [row for row in candidates if Delivery(row["id"], row["delivery"]) not in held]
        if not lost:
            return 0
        swept = connection.execute(
            query("sweep"), {"ids": [row["id"] for row in lost], "deliveries": [row["delivery"] for row in lost]}
        ).fetchall()
    log = logs.get()
    for row in swept:
        log.warning(
            "swept row",
            type=row["task"],
            queue=row["queue"],
            row=row["id"],
            delivery=row["delivery"],
            request_id=row["request_id"],
        )
    return len(swept)


def held_deliveries(client: redis.Redis, queues: list[str]) -> set[Delivery]:
    """Returns every delivery that Redis holds: one snapshot of rq-scheduler's set, the queues, and what stock RQ
    workers keep while they pop.

    The write that goes along makes a Redis that is read-only or out of memory fail here, as it would for a relay.
    """
    pipeline = client.pipeline(transaction=True)
    pipeline.set(CANARY, 1, ex=60)
    pipeline.zrange(SCHEDULED_JOBS, 0, -1)
    for name in queues:
        key = f"{Queue.redis_queue_namespace_prefix}{name}"
        pipeline.lrange(key, 0, -1)
        pipeline.lrange(IntermediateQueue.get_intermediate_queue_key(key), 0, -1)
    _, *lists = pipeline.execute()
    return {delivery for job_ids in lists for job_id in job_ids if (delivery := Delivery.parse(job_id))}
