"""Injects faults of Postgres and Redis."""

import asyncio
import pickle
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, LiteralString

from tests.chaos.faults import Injection, Kind
from tests.chaos.mailserver import Misbehaviour
from tests.chaos.system import LEASE

_AWAY = (0.0, 6.0)
"""Seconds that a server is away."""
_QUEUES = ("rq:queue:critical", "rq:queue:default")
_SCHEDULED = "rq:scheduler:scheduled_jobs"
_SOME_ROWS = "SELECT FROM outbox WHERE status IN ('enqueued', 'running') ORDER BY random() LIMIT 5"
_TABLE_LOCKS: tuple[LiteralString, ...] = (
    "LOCK TABLE outbox IN SHARE MODE",
    "LOCK TABLE outbox IN SHARE ROW EXCLUSIVE MODE",
)
"""Locks of `CREATE INDEX` and `CREATE TRIGGER`."""
_JUMPS = (20.0, 3600.0)
"""Seconds: somewhat more than a lease, and a wrong time zone."""
LONGEST_JUMP = max(_JUMPS)
CLOCK_JUMP = "postgres.clock-jump"
_LOCKS: dict[str, LiteralString] = {
    "update": f"{_SOME_ROWS} FOR UPDATE SKIP LOCKED",
    "foreign key": f"{_SOME_ROWS} FOR KEY SHARE SKIP LOCKED",
}


async def _stop_postgres(injection: Injection) -> None:
    injection.system.postgres.stop_at_once()
    await injection.hold(*_AWAY)
    await injection.system.postgres.start()


async def _pause_postgres(injection: Injection) -> None:
    injection.system.postgres.suspend()
    try:
        await injection.hold(0.5, 8)
    finally:
        injection.system.postgres.resume()


async def _pause_postgres_beyond_lease(injection: Injection) -> None:
    """Pauses Postgres beyond the lease during mails: the workers are alive, and no row may go to another worker."""
    mail = injection.system.mail
    mail.misbehaviour = Misbehaviour("dot", "slow")
    try:
        await injection.hold(0.5, 1.5)
        injection.system.postgres.suspend()
        await injection.hold(16, 20)
    finally:
        injection.system.postgres.resume()
        mail.misbehaviour = None


async def _lock_rows(injection: Injection) -> None:
    """Locks some rows during their attempts for 5 to 25 s, as a foreign transaction may."""
    mail, postgres = injection.system.mail, injection.system.postgres
    mail.misbehaviour = Misbehaviour("dot", "slow")
    try:
        await injection.hold(0.5, 1.5)
        async with postgres.connection() as connection, connection.transaction():
            cursor = await connection.execute(_LOCKS[injection.draw.choice(sorted(_LOCKS))])
            injection.fault.note = f"{cursor.rowcount} rows"
            mail.misbehaviour = None
            await injection.hold(5, 25)
    finally:
        mail.misbehaviour = None


async def _lock_table(injection: Injection) -> None:
    """Locks the table against writes for longer than a lease, during mails; reads continue."""
    mail, lock = injection.system.mail, injection.draw.choice(_TABLE_LOCKS)
    injection.fault.note = lock
    mail.misbehaviour = Misbehaviour("dot", "slow")
    try:
        await injection.hold(0.5, 1.5)
        async with injection.system.postgres.connection() as connection, connection.transaction():
            await connection.execute(lock)
            mail.misbehaviour = None
            await injection.hold(LEASE + 10, LEASE + 10)
    finally:
        mail.misbehaviour = None


async def _jump_clock(injection: Injection) -> None:
    """Makes Postgres' clock jump forward during mails, and back: all leases pass while the workers are alive."""
    mail, clock, ahead = injection.system.mail, injection.system.postgres.clock, injection.draw.choice(_JUMPS)
    assert clock is not None
    injection.fault.note = f"{ahead:g} s"
    mail.misbehaviour = Misbehaviour("dot", "slow")
    try:
        await injection.hold(0.5, 1.5)
        clock.set_ahead(ahead)
        await injection.hold(2, 3)
        mail.misbehaviour = None
        await injection.hold(0, LEASE + 5)
    finally:
        clock.set_ahead(0)
        mail.misbehaviour = None


async def _terminate_connections(injection: Injection) -> None:
    injection.fault.note = f"{await injection.system.postgres.terminate_connections()} connections"


def _stop_redis(number: signal.Signals, longest: float) -> Callable[[Injection], Any]:
    async def inject(injection: Injection) -> None:
        injection.system.redis.send(number)
        await injection.hold(0, longest)
        await injection.system.redis.start()

    return inject


async def _flush_redis(injection: Injection) -> None:
    await injection.system.redis.client.flushall()


async def _pause_redis(injection: Injection) -> None:
    injection.system.redis.send(signal.SIGSTOP)
    try:
        await injection.hold(0.5, 20)
    finally:
        injection.system.redis.send(signal.SIGCONT)


async def _fill_redis(injection: Injection) -> None:
    await injection.system.redis.client.config_set("maxmemory", 1)
    try:
        await injection.hold(1, 8)
    finally:
        await injection.system.redis.client.config_set("maxmemory", 0)


async def _make_redis_read_only(injection: Injection) -> None:
    await injection.system.redis.client.replicaof("127.0.0.1", "1")  # no server listens there
    try:
        await injection.hold(1, 8)
    finally:
        await injection.system.redis.client.replicaof("NO", "ONE")


async def _fail_over_to_a_stale_replica(injection: Injection) -> None:
    copied = await injection.system.redis.copy()
    await injection.hold(1, 6)
    await injection.system.redis.become(copied)
    injection.fault.note = f"{len(copied)} keys"


async def _write_hostile_jobs(injection: Injection) -> None:
    """Writes ids of past, present and future deliveries, garbage, and pickles that create a folder when loaded."""
    draw, client = injection.draw, injection.system.redis.client
    newest = max(1, len(injection.system.mail.mails))
    bomb = zlib.compress(pickle.dumps(Bomb(injection.system.folder / "bombs" / str(injection.fault.number))))
    for _ in range(3):
        rows = [max(1, newest + draw.randrange(-60, 60)) for _ in range(60)]
        ids = [f"{row}-{draw.choice((1, 1, 1, 2, 2, 3, 4, 7, 2_000_000_000))}" for row in rows]
        async with client.pipeline(transaction=True) as pipeline:
            for number, job_id in enumerate(ids):
                pipeline.rpush(draw.choice(_QUEUES), job_id)
                pipeline.zadd(_SCHEDULED, {draw.choice(ids): time.time() + draw.uniform(-5, 60)})
                if number % 10 == 0:
                    pipeline.hset(f"rq:job:{job_id}", mapping={"data": bomb, "origin": "critical", "status": "queued"})
            for name in _QUEUES:
                pipeline.rpush(name, b"", b"\x00\xff", b"12-", b"0-0", b"9" * 40 + b"-1", b"x" * 10_000)
            pipeline.zadd(_SCHEDULED, {"not ours": 0, "nor this": float("inf")})
            # Some commands fail if another fault left a key of the wrong type that no relay has repaired yet.
            await pipeline.execute(raise_on_error=False)
        await asyncio.sleep(draw.uniform(0, 0.5))


async def _write_keys_of_wrong_types(injection: Injection) -> None:
    keys = (*_QUEUES, _SCHEDULED, "rq:queues", "rq:workers", "rq:workers:critical", "rq:queue:critical:intermediate")
    for key in injection.draw.sample(keys, 3):
        await injection.system.redis.client.set(key, "not what you think")
    injection.fault.note = "until a relay repairs it"


class Bomb:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        """Returns the call that loads it."""
        import os

        return os.makedirs, (str(self._folder),)


KINDS = (
    Kind("postgres.stop", _stop_postgres, weight=2),
    Kind("postgres.pause", _pause_postgres),
    Kind("postgres.pause-beyond-lease", _pause_postgres_beyond_lease, further_targets=("mail",)),
    Kind("postgres.lock-rows", _lock_rows, weight=2, further_targets=("mail",)),
    Kind("postgres.lock-table", _lock_table, further_targets=("mail",)),
    Kind(CLOCK_JUMP, _jump_clock, further_targets=("mail",)),
    Kind("postgres.terminate", _terminate_connections, weight=2),
    Kind("redis.kill", _stop_redis(signal.SIGKILL, _AWAY[1]), weight=2),
    Kind("redis.restart", _stop_redis(signal.SIGTERM, 0.2)),
    Kind("redis.flushall", _flush_redis, weight=2),
    Kind("redis.pause", _pause_redis),
    Kind("redis.full", _fill_redis),
    Kind("redis.read-only", _make_redis_read_only),
    Kind("redis.stale-replica", _fail_over_to_a_stale_replica, weight=2),
    Kind("redis.hostile-jobs", _write_hostile_jobs, weight=2),
    Kind("redis.wrong-types", _write_keys_of_wrong_types),
)
