"""Moves due jobs from rq-scheduler's set to their queues."""

import redis
from rq.job import Job
from rq.queue import Queue
from rq_scheduler import Scheduler

from outbox.rq_jobs import IS_JOB_ID
from outbox.runtime.foreign_jobs import MAX_KEPT, ForeignJobs, aside_key

SCHEDULED_JOBS: str = Scheduler.scheduled_jobs_key
"""The key of rq-scheduler's sorted set, scored by the time when a job is due."""

LEFT = 1000
"""Upper bound of due members that stay in the set because they are not ours to move: each move reads past them."""

_BATCH = 500

# One round trip per batch, and atomic: no crash can lose a job between the set and its queue, and relays side by side
# move none twice. Members that are not ours to move stay: a foreign job is for its own rq-scheduler, and a row's job in
# a queue that this relay does not know is for another relay. Too many of them mean that nothing moves them. Above the
# limit, foreign jobs go to a set of their own, and a row's job is dropped, which the sweep notices. Ids without a job
# are dropped too.
_MOVE = """
local now, batch, offset, prefix, queues, kept, left_limit = unpack(ARGV)
local moved, left, foreign, aside, dropped = 0, 0, {}, {}, {}
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', offset, batch)
for _, id in ipairs(found) do
    local origin = #id <= 1000 and redis.pcall('HGET', prefix .. id, 'origin')
    local is_job = type(origin) == 'string' and #origin < 1000 -- else each look would read it
    local is_ours = is_job_id(id)
    local queue = false
    for j = 8, #ARGV do queue = queue or is_job and is_ours and origin == ARGV[j] and queues .. origin end
    local stays = is_job and not queue and offset + left < tonumber(left_limit)
    if queue then
        redis.call('HSET', prefix .. id, 'status', 'queued')
        redis.call('SADD', KEYS[2], queue)
        redis.call('RPUSH', queue, id)
        moved = moved + 1
    elseif stays then
        left = left + 1
        if not is_ours then foreign[1] = string.sub(id, 1, 100) end
    else
        local has = is_job and not is_ours and redis.pcall('ZCARD', KEYS[3])
        local to = dropped
        if type(has) == 'number' and has < tonumber(kept) then
            local score = redis.call('ZSCORE', KEYS[1], id)
            if type(redis.pcall('ZADD', KEYS[3], score, id)) == 'number' then to = aside end
        end
        to[#to + 1] = {string.sub(id, 1, 100), has and 1 or 0}
    end
    if not stays then redis.call('ZREM', KEYS[1], id) end
end
local upcoming = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
return {moved, left, foreign, aside, dropped, upcoming or ''}
"""


class Schedule:
    """The set of scheduled jobs, in rq-scheduler's format, so that its tools read it.

    rq-scheduler's own loop is not used: it installs signal handlers, catches no errors, reads this machine's clock and
    moves one job per several round trips.
    """

    def __init__(self, client: redis.Redis, queues: list[str]) -> None:
        self._move = client.register_script(IS_JOB_ID + _MOVE)
        self._queues = queues
        self._foreign = ForeignJobs()

    def move_due(self, now: float) -> float | None:
        """Moves due jobs to their queues and returns when the next one is due, or None if no job is left.

        Args:
            now: Postgres' time, in seconds since the epoch, like the time that it returns.

        Raises:
            redis.RedisError: Redis is away.
        """
        keys = [SCHEDULED_JOBS, Queue.redis_queues_keys, aside_key(SCHEDULED_JOBS)]
        prefixes = [Job.redis_job_namespace_prefix, Queue.redis_queue_namespace_prefix]
        left = 0
        while True:
            arguments: list[str | int | float] = [now, _BATCH, left, *prefixes, MAX_KEPT, LEFT, *self._queues]
            moved, stayed, foreign, aside, dropped, upcoming = self._move(keys=keys, args=arguments)
            for member in foreign:
                self._foreign.log_left_alone(member, SCHEDULED_JOBS)
            for member, _ in aside:
                self._foreign.log_put_aside(member, SCHEDULED_JOBS)
            for member, is_job in dropped:
                self._foreign.log_dropped(member, is_job=is_job, key=SCHEDULED_JOBS)
            if moved + stayed + len(aside) + len(dropped) < _BATCH:
                return float(upcoming) if upcoming else None
            left += stayed
