"""Moving due jobs from rq-scheduler's set to their queues."""

import redis
from rq.job import Job
from rq.queue import Queue
from rq_scheduler import Scheduler

from outbox import logs
from outbox.jobs import OutboxJob

SCHEDULED_JOBS = Scheduler.scheduled_jobs_key

_BATCH = 500

# One round trip per batch, and atomic: no crash can lose a job between the set and its queue, and relays side by
# side move none twice. Members that are not ours (no delivery's id, no queue of ours) are taken out and reported.
_MOVE = """
local moved, foreign = 0, {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, ARGV[2])) do
    local origin = false
    if string.match(id, '^%d+%-%d+$') then
        local found = redis.pcall('HGET', ARGV[3] .. id, 'origin')
        origin = type(found) == 'string' and found
    end
    local queue = false
    for i = 5, #ARGV do queue = queue or origin == ARGV[i] and ARGV[4] .. origin end
    if queue then
        redis.call('HSET', ARGV[3] .. id, 'status', 'queued')
        redis.call('SADD', KEYS[2], queue)
        redis.call('RPUSH', queue, id)
        moved = moved + 1
    else
        foreign[#foreign + 1] = string.sub(id, 1, 100)
    end
    redis.call('ZREM', KEYS[1], id)
end
return {moved, foreign, redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2] or ''}
"""


class Schedule(Scheduler):  # type: ignore[misc]  # rq-scheduler is untyped
    """rq-scheduler's set and format, with JSON jobs, a clock that is Postgres', and a move of many jobs at once.

    rq-scheduler's own loop installs signal handlers, catches nothing and moves one job per several round trips.
    Its set stays as it is, so that its tools read it.
    """

    job_class = OutboxJob

    def __init__(self, client: redis.Redis, queues: list[str]) -> None:
        super().__init__(connection=client, queue_name=queues[0])
        self._move = client.register_script(_MOVE)
        self._queues = queues

    def move_due(self, now: float) -> float | None:
        """Moves the jobs whose time has come and returns when the next one's comes; None where there is none.

        A member that names no delivery, or whose job is gone, is dropped; where it was a row's, the sweep notices.

        Args:
            now: seconds since the epoch, by Postgres' clock, as is what it returns.

        Raises:
            redis.RedisError: Redis is away.
        """
        arguments: list[str | int | float] = [
            now,
            _BATCH,
            Job.redis_job_namespace_prefix,
            Queue.redis_queue_namespace_prefix,
            *self._queues,
        ]
        while True:
            moved, foreign, upcoming = self._move(
                keys=[self.scheduled_jobs_key, Queue.redis_queues_keys], args=arguments
            )
            for member in foreign:
                logs.get().warning("dropped job", job=repr(member), why="no job of ours has this id")
            if moved + len(foreign) < _BATCH:
                return float(upcoming) if upcoming else None
