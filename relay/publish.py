"""Handing pending rows over to Redis."""

from typing import Any

import redis
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.utils import now as rq_now

from outbox import logs
from outbox.jobs import Delivery, OutboxJob, deliver
from outbox.postgres import Connection
from outbox.queries import query
from outbox.settings import RelaySettings
from relay.schedule import SCHEDULED_JOBS

HASH_TTL = 86_400
"""Seconds that a job's hash may outlive its id. Only ids matter to us; this keeps lost ones from filling Redis."""

Row = dict[str, Any]


def publish(connection: Connection, client: redis.Redis, queue: str, settings: RelaySettings) -> int:
    """Hands over one batch of a queue's rows and returns how many there were.

    Redis has the jobs before Postgres commits: a crash between the two leaves jobs whose delivery no row has, which
    workers drop, and rows that are still pending.

    Raises:
        redis.RedisError: Redis did not take the batch; nothing is marked.
        psycopg.OperationalError: Postgres is away.
    """
    with connection.transaction():
        rows = connection.execute(
            query("publish"),
            {"queue": queue, "window": settings.window, "horizon": settings.horizon, "batch": settings.batch},
        ).fetchall()
        if rows:
            rows.sort(key=lambda row: (row["run_at"], row["id"]))
            write_jobs(client, rows)
    log = logs.get()
    for row in rows:
        log.info(
            "enqueued task",
            type=row["task"],
            queue=row["queue"],
            max_retry=row["max_retries"],
            payload=row["payload"],
            row=row["id"],
            delivery=row["delivery"],
            request_id=row["request_id"],
        )
    return len(rows)


def write_jobs(client: redis.Redis, rows: list[Row]) -> None:
    """Writes the rows as RQ jobs, in one transaction: due ones into their queue, others into rq-scheduler's set."""
    jobs = [_job(client, row) for row in rows]
    pipeline = client.pipeline(transaction=True)
    pipeline.delete(*(job.key for job in jobs))  # a stranger's key of that name, whatever its type
    due: dict[str, list[str]] = {}
    scheduled: dict[str, float] = {}
    for row, job in zip(rows, jobs, strict=True):
        job.save(pipeline=pipeline)
        pipeline.expire(job.key, HASH_TTL)
        if row["scheduled"]:
            scheduled[job.id] = row["run_at"]
        else:
            due.setdefault(row["queue"], []).append(job.id)
    for name, job_ids in due.items():
        queue = Queue(name, connection=client, serializer=JSONSerializer)
        pipeline.sadd(Queue.redis_queues_keys, queue.key)
        pipeline.rpush(queue.key, *job_ids)
    if scheduled:
        pipeline.zadd(SCHEDULED_JOBS, scheduled)
    pipeline.execute()


def _job(client: redis.Redis, row: Row) -> Job:
    delivery = Delivery(row["id"], row["delivery"])
    job = OutboxJob.create(
        deliver,
        args=(delivery.row, delivery.number),
        connection=client,
        id=delivery.job_id,
        origin=row["queue"],
        timeout=row["timeout"],
        result_ttl=0,
        description=f"{row['task']} (row {delivery.row}, delivery {delivery.number})",
        status=JobStatus.SCHEDULED if row["scheduled"] else JobStatus.QUEUED,
        serializer=JSONSerializer,
    )
    job.enqueued_at = rq_now()
    return job
