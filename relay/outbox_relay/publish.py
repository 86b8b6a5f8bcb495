"""Publishes pending rows to Redis as RQ jobs."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import redis
from psycopg.rows import scalar_row
from rq.job import Job
from rq.queue import Queue
from rq.utils import now as rq_now

from outbox.queries import query
from outbox.row import named
from outbox.rq_jobs import OutboxJob, deliver, queue_key
from outbox.runtime import logs
from outbox.runtime.postgres import Connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.repair import CANARY
from outbox_relay.schedule import SCHEDULED_JOBS

HASH_TTL = 86_400
"""Time to live of a job's hash, in seconds: hashes whose ids are lost must not fill Redis. Workers read only ids."""

TEMPLATE = "outbox:template"
"""The key of the job that a script copies. It is not one of RQ's keys, which a foreign job may have."""

_SLICE = 1000
"""Rows that one run of the script writes. Redis serves no one else during a run."""

_OWN_FIELDS = frozenset({"data", "description", "timeout", "status"})

# Each job of a slice is a copy of the template, with its time to live, and then gets its own fields. A copy replaces a
# foreign key with the job's name. RQ also reads data that is not compressed.
_WRITE = """
local queues, queue, schedule, template = unpack(KEYS)
local prefix, ttl, called, shared = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
redis.call('DEL', template)
redis.call('HSET', template, unpack(ARGV, 5, 4 + shared))
redis.call('EXPIRE', template, ttl)
local due, scheduled = {}, {}
for i = 5 + shared, #ARGV, 5 do
    local row, delivery, task, timeout, run_at = unpack(ARGV, i, i + 4)
    local id = row .. '-' .. delivery
    redis.call('COPY', template, prefix .. id, 'REPLACE')
    redis.call('HSET', prefix .. id,
        'data', '["' .. called .. '", null, [' .. row .. ', ' .. delivery .. '], {}]',
        'description', task .. ' (row ' .. row .. ', delivery ' .. delivery .. ')',
        'timeout', timeout,
        'status', run_at == '' and 'queued' or 'scheduled')
    if run_at == '' then
        due[#due + 1] = id
    else
        scheduled[#scheduled + 1] = run_at
        scheduled[#scheduled + 1] = id
    end
end
redis.call('DEL', template)
if #due > 0 then
    redis.call('SADD', queues, queue)
    redis.call('RPUSH', queue, unpack(due))
end
if #scheduled > 0 then redis.call('ZADD', schedule, unpack(scheduled)) end
"""


class Published(NamedTuple):
    """A row of the statement `publish`: handed over, once its transaction commits."""

    id: int
    delivery: int
    task: str
    queue: str
    max_retries: int
    timeout: int
    """Seconds."""
    request_id: str | None
    payload: str
    """The beginning of the JSON, as a log line shows it; empty if nothing is logged."""
    scheduled: bool
    """Whether it is not due yet."""
    run_at: float
    """Seconds since the epoch."""


def publish(
    connection: Connection,
    client: redis.Redis,
    queue: str,
    settings: RelaySettings,
    *,
    room: int | None = None,
    limit: int | None = None,
    left_out: Sequence[int] = (),
    tried: list[int] | None = None,
) -> int:
    """Hands over one batch of a queue's rows and returns the number of rows.

    Redis has the jobs before Postgres commits. A crash between the two leaves rows that are still pending, and jobs
    whose delivery no row has, which workers drop.

    Args:
        connection: in autocommit mode.
        client: of the Redis that gets the jobs.
        queue: the queue's name.
        settings: batch, window and horizon.
        room: rows that the window has room for, if the caller has counted them.
        limit: upper bound of rows, if less than a batch.
        left_out: ids of rows that stay `pending`.
        tried: if `limit` is 1, gets the row's id before the row is handed over.

    Raises:
        redis.RedisError: Redis did not take the batch; all rows stay `pending`.
        psycopg.Error: Postgres is away, or refuses a row, by a trigger for example; all rows stay `pending`.
    """
    pending = {"queue": queue, "horizon": settings.horizon, "left_out": list(left_out)}
    payload_limit = logs.PAYLOAD_LIMIT if logs.get().is_enabled_for(logging.INFO) else 0
    with connection.transaction():
        if limit == 1 and tried is not None:
            tried += connection.cursor(row_factory=scalar_row).execute(query("first_pending"), pending)
        # Reading numbers from text would take psycopg a fifth longer.
        cursor = connection.cursor(binary=True, row_factory=named(Published))
        rows = cursor.execute(
            query("publish"),
            {
                **pending,
                "window": settings.window,
                "batch": settings.batch if limit is None else min(settings.batch, limit),
                "room": room,
                "payload_limit": payload_limit,
            },
        ).fetchall()
        if rows:
            rows.sort(key=lambda row: (row.run_at, row.id))
            write_jobs(client, rows)
    _log(rows)
    return len(rows)


def _log(rows: list[Published]) -> None:
    log = logs.get()
    if not log.is_enabled_for(logging.INFO):
        return
    for row in rows:
        log.info(
            "enqueued task",
            type=row.task,
            queue=row.queue,
            max_retry=row.max_retries,
            payload=logs.payload_field(row.payload),
            row=row.id,
            delivery=row.delivery,
            request_id=row.request_id,
        )


def write_jobs(client: redis.Redis, rows: list[Published]) -> None:
    """Writes one queue's rows as RQ jobs, in one transaction: due ones into the queue, others into rq-scheduler's set.

    RQ itself writes one template, and a script in Redis fills in what differs: building an RQ job per row would cost
    more than all else that is done for it.

    The canary is written first, so that a server that is full refuses all jobs. Redis refuses to queue any command
    then; Valkey 9 queues a script, and once the script has deleted a key it may write past `maxmemory`.
    """
    queue = rows[0].queue
    shared = _shared_fields(client, queue)
    fields: list[Any] = [part for name in sorted(shared) for part in (name, shared[name])]
    prefix, called = Job.redis_job_namespace_prefix, f"{deliver.__module__}.{deliver.__qualname__}"
    keys = [Queue.redis_queues_keys, queue_key(queue), SCHEDULED_JOBS, TEMPLATE]
    given: list[Any] = [prefix, HASH_TTL, called, len(fields)]
    with client.pipeline(transaction=True) as pipeline:
        pipeline.set(CANARY, 1, ex=60)
        for start in range(0, len(rows), _SLICE):
            own: list[Any] = [part for row in rows[start : start + _SLICE] for part in _own_parts(row)]
            pipeline.eval(_WRITE, len(keys), *keys, *given, *fields, *own)
        pipeline.execute()


def _shared_fields(client: redis.Redis, queue: str) -> dict[str, Any]:
    """Returns the fields that all jobs of a queue share, as this version of RQ writes them."""
    job = OutboxJob.create(deliver, args=(0, 0), connection=client, id="0-0", origin=queue, result_ttl=0)
    job.enqueued_at = rq_now()
    return {name: value for name, value in job.to_dict().items() if name not in _OWN_FIELDS}


def _own_parts(row: Published) -> tuple[int, int, str, int, float | str]:
    return row.id, row.delivery, row.task, row.timeout, row.run_at if row.scheduled else ""
