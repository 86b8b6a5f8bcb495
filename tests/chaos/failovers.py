"""Injects fail-overs: another server becomes the primary, the address moves, and old connections stay open."""

import asyncio
import os
import shutil
import time
from pathlib import Path

from outbox.devstack.embedded import embedded_redis
from tests.chaos.faults import Injection, Kind
from tests.chaos.ports import free_port
from tests.chaos.servers import Postgres, Redis
from tests.support.redis_pair import replicating
from tests.support.standby import KEPT, make_standby, standby

_OLD_PRIMARY_UP = (10.0, 20.0)
"""Seconds that the old primary stays up, read-only, with its connections after the address has moved."""


async def _fail_over_redis(injection: Injection) -> None:
    """Promotes a replica. For a moment both accept writes, and those to the old primary are lost."""
    system, old = injection.system, injection.system.redis
    starting = embedded_redis(system.folder / f"redis-{injection.fault.number}", settings=replicating(free_port()))
    new = Redis(await system.server_starter.start(starting))
    await new.follow(old)
    injection.fault.start = time.time()  # the copy affected nothing
    await new.client.replicaof("NO", "ONE")
    system.redis = new
    try:
        await injection.hold(0, 1)
        _move_address(injection, new)
        await injection.hold(0, 1)
        await old.follow(new)
        injection.fault.end = time.time()
        await injection.hold(*_OLD_PRIMARY_UP)
        injection.fault.note = _describe_remaining(await old.clients())
        await old.shut_down()
    finally:
        await old.close()


async def _fail_over_postgres(injection: Injection) -> None:
    """Promotes a standby that has every commit; for some seconds a standby serves the old address."""
    system, old = injection.system, injection.system.postgres
    environment = None if old.clock is None else {**os.environ, **old.clock.environment}
    folder = system.folder / f"postgres-{injection.fault.number}"
    starting = standby(folder, old.url, settings=[KEPT], environment=environment)
    new = Postgres(await system.server_starter.start(starting), old.clock)
    await old.await_standby()
    data = Path((await old.ask("SHOW data_directory"))[0][0])
    injection.fault.start = time.time()  # the copy affected nothing
    await old.shut_down()
    await new.ask("SELECT pg_promote()")
    try:
        make_standby(data, new.url)
        await old.start()
        await new.await_standby()  # fails unless the standby had every commit
        await injection.hold(2, 6)
    finally:
        system.postgres = new
        _move_address(injection, new)
    injection.fault.end = time.time()
    await injection.hold(*_OLD_PRIMARY_UP)
    injection.fault.note = _describe_remaining(await old.clients())
    await old.shut_down()
    await asyncio.to_thread(shutil.rmtree, data)


def _move_address(injection: Injection, new: Postgres | Redis) -> None:
    (target,) = injection.fault.targets
    for proxy in injection.system.proxies[target]:
        proxy.set_upstream(new.socket)


def _describe_remaining(clients: list[str]) -> str:
    return f"still connected to the old primary: {', '.join(clients) or 'none'}"


KINDS = (
    Kind("redis.fail-over", _fail_over_redis),
    Kind("postgres.fail-over", _fail_over_postgres),
)
