"""Faults of Postgres and Redis."""

import asyncio
import pickle
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, LiteralString

from tests.chaos.faults import Act, Kind
from tests.chaos.mailserver import Misbehaviour
from tests.chaos.stage import LEASE

_AWAY = (0.0, 6.0)
"""Seconds that a server is away."""
_QUEUES = ("rq:queue:critical", "rq:queue:default")
_SCHEDULED = "rq:scheduler:scheduled_jobs"
_SOME = "SELECT FROM outbox WHERE status IN ('enqueued', 'running') ORDER BY random() LIMIT 5"
_TABLE_LOCKS: tuple[LiteralString, ...] = (
    "LOCK TABLE outbox IN SHARE MODE",
    "LOCK TABLE outbox IN SHARE ROW EXCLUSIVE MODE",
)
"""As `CREATE INDEX` and `CREATE TRIGGER` take them."""
_JUMPS = (20.0, 3600.0)
"""Seconds: a lease and some more, and a wrong time zone."""
LONGEST_JUMP = max(_JUMPS)
CLOCK_JUMP = "postgres.clock-jump"
_LOCKS: dict[str, LiteralString] = {
    "update": f"{_SOME} FOR UPDATE SKIP LOCKED",
    "foreign key": f"{_SOME} FOR KEY SHARE SKIP LOCKED",
}


async def _stop_postgres(act: Act) -> None:
    act.stage.postgres.stop_at_once()
    await act.hold(*_AWAY)
    await act.stage.postgres.start()


async def _pause_postgres(act: Act) -> None:
    act.stage.postgres.suspend()
    try:
        await act.hold(0.5, 8)
    finally:
        act.stage.postgres.resume()


async def _pause_postgres_beyond_lease(act: Act) -> None:
    """Lets all leases pass in the middle of mails: their workers live, and nothing may be handed on."""
    mail = act.stage.mail
    mail.misbehaviour = Misbehaviour("dot", "slow")
    try:
        await act.hold(0.5, 1.5)
        act.stage.postgres.suspend()
        await act.hold(16, 20)
    finally:
        act.stage.postgres.resume()
        mail.misbehaviour = None


async def _lock_rows(act: Act) -> None:
    """Locks some rows in the middle of their attempts, for longer than a lease, as a stranger's transaction may."""
    mail, postgres = act.stage.mail, act.stage.postgres
    mail.misbehaviour = Misbehaviour("dot", "slow")
    try:
        await act.hold(0.5, 1.5)
        async with postgres.connection() as connection, connection.transaction():
            cursor = await connection.execute(_LOCKS[act.draw.choice(sorted(_LOCKS))])
            act.fault.note = f"{cursor.rowcount} rows"
            mail.misbehaviour = None
            await act.hold(5, 25)
    finally:
        mail.misbehaviour = None


async def _lock_table(act: Act) -> None:
    """Locks the table against writes for longer than a lease, in the middle of mails: who reads it sees nothing."""
    mail, lock = act.stage.mail, act.draw.choice(_TABLE_LOCKS)
    act.fault.note = lock
    mail.misbehaviour = Misbehaviour("dot", "slow")
    try:
        await act.hold(0.5, 1.5)
        async with act.stage.postgres.connection() as connection, connection.transaction():
            await connection.execute(lock)
            mail.misbehaviour = None
            await act.hold(LEASE + 10, LEASE + 10)
    finally:
        mail.misbehaviour = None


async def _jump_clock(act: Act) -> None:
    """Lets Postgres' clock jump forward in the middle of mails, and back: all leases pass, and their workers live."""
    mail, clock, ahead = act.stage.mail, act.stage.postgres.clock, act.draw.choice(_JUMPS)
    assert clock is not None
    act.fault.note = f"{ahead:g} s"
    mail.misbehaviour = Misbehaviour("dot", "slow")
    try:
        await act.hold(0.5, 1.5)
        clock.set_ahead(ahead)
        await act.hold(2, 3)
        mail.misbehaviour = None
        await act.hold(0, LEASE + 5)
    finally:
        clock.set_ahead(0)
        mail.misbehaviour = None


async def _terminate_connections(act: Act) -> None:
    act.fault.note = f"{await act.stage.postgres.terminate_connections()} connections"


def _stop_redis(number: signal.Signals, longest: float) -> Callable[[Act], Any]:
    async def inject(act: Act) -> None:
        act.stage.redis.send(number)
        await act.hold(0, longest)
        await act.stage.redis.start()

    return inject


async def _flush_redis(act: Act) -> None:
    await act.stage.redis.client.flushall()


async def _pause_redis(act: Act) -> None:
    act.stage.redis.send(signal.SIGSTOP)
    try:
        await act.hold(0.5, 20)
    finally:
        act.stage.redis.send(signal.SIGCONT)


async def _fill_redis(act: Act) -> None:
    await act.stage.redis.client.config_set("maxmemory", 1)
    try:
        await act.hold(1, 8)
    finally:
        await act.stage.redis.client.config_set("maxmemory", 0)


async def _make_redis_read_only(act: Act) -> None:
    await act.stage.redis.client.replicaof("127.0.0.1", "1")  # of a master that is not there
    try:
        await act.hold(1, 8)
    finally:
        await act.stage.redis.client.replicaof("NO", "ONE")


async def _fail_over_to_a_stale_replica(act: Act) -> None:
    copied = await act.stage.redis.copy()
    await act.hold(1, 6)
    await act.stage.redis.become(copied)
    act.fault.note = f"{len(copied)} keys"


async def _write_hostile_jobs(act: Act) -> None:
    """Writes ids of past, present and future deliveries, garbage, and pickles that leave a mark when loaded."""
    draw, client = act.draw, act.stage.redis.client
    newest = max(1, len(act.stage.mail.mails))
    bomb = zlib.compress(pickle.dumps(Bomb(act.stage.folder / "bombs" / str(act.fault.number))))
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
            # Of keys of the wrong type, which another fault may have left and no relay has repaired yet, some fail.
            await pipeline.execute(raise_on_error=False)
        await asyncio.sleep(draw.uniform(0, 0.5))


async def _write_keys_of_wrong_types(act: Act) -> None:
    keys = (*_QUEUES, _SCHEDULED, "rq:queues", "rq:workers", "rq:workers:critical", "rq:queue:critical:intermediate")
    for key in act.draw.sample(keys, 3):
        await act.stage.redis.client.set(key, "not what you think")
    act.fault.note = "until a relay repairs it"


class Bomb:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        """Says how it is to be loaded."""
        import os

        return os.makedirs, (str(self._folder),)


KINDS = (
    Kind("postgres.stop", _stop_postgres, weight=2),
    Kind("postgres.pause", _pause_postgres),
    Kind("postgres.pause-beyond-lease", _pause_postgres_beyond_lease, further=("mail",)),
    Kind("postgres.lock-rows", _lock_rows, weight=2, further=("mail",)),
    Kind("postgres.lock-table", _lock_table, further=("mail",)),
    Kind(CLOCK_JUMP, _jump_clock, further=("mail",)),
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
