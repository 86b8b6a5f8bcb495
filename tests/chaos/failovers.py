"""Faults after which another server is the primary: the address moves, and connections to the old one stay open."""

import asyncio
import os
import shutil
import time
from pathlib import Path

from outbox.devstack.embedded import embedded_redis
from tests.chaos.faults import Act, Kind
from tests.chaos.ports import free_port
from tests.chaos.servers import Postgres, Redis
from tests.support.redis_pair import replicating
from tests.support.standby import KEPT, make_standby, standby

_STAYS = (10.0, 20.0)
"""Seconds that the old primary stays up under the connections to it, read-only, after the address has moved."""


async def _fail_over_redis(act: Act) -> None:
    """Promotes a replica. For a moment both take writes, and what the old one takes then is lost."""
    stage, old = act.stage, act.stage.redis
    starting = embedded_redis(stage.folder / f"redis-{act.fault.number}", settings=replicating(free_port()))
    new = Redis(await stage.spares.start(starting))
    await new.follow(old)
    act.fault.start = time.time()  # the copy has struck nobody
    await new.client.replicaof("NO", "ONE")
    stage.redis = new
    try:
        await act.hold(0, 1)
        _move_address(act, new)
        await act.hold(0, 1)
        await old.follow(new)
        act.fault.end = time.time()
        await act.hold(*_STAYS)
        act.fault.note = _left(await old.clients())
        await old.shut_down()
    finally:
        await old.close()


async def _fail_over_postgres(act: Act) -> None:
    """Promotes a standby that has all that was committed; at the old address there is a standby for some seconds."""
    stage, old = act.stage, act.stage.postgres
    environment = None if old.clock is None else {**os.environ, **old.clock.environment}
    folder = stage.folder / f"postgres-{act.fault.number}"
    starting = standby(folder, old.url, settings=[KEPT], environment=environment)
    new = Postgres(await stage.spares.start(starting), old.clock)
    await old.await_standby()
    data = Path((await old.ask("SHOW data_directory"))[0][0])
    act.fault.start = time.time()  # the copy has struck nobody
    await old.shut_down()
    await new.ask("SELECT pg_promote()")
    try:
        make_standby(data, new.url)
        await old.start()
        await new.await_standby()  # which fails unless all that was committed was in the standby
        await act.hold(2, 6)
    finally:
        stage.postgres = new
        _move_address(act, new)
    act.fault.end = time.time()
    await act.hold(*_STAYS)
    act.fault.note = _left(await old.clients())
    await old.shut_down()
    await asyncio.to_thread(shutil.rmtree, data)


def _move_address(act: Act, new: Postgres | Redis) -> None:
    (target,) = act.fault.targets
    for proxy in act.stage.proxies[target]:
        proxy.lead_to(new.socket)


def _left(clients: list[str]) -> str:
    return f"still connected to the old primary: {', '.join(clients) or 'nobody'}"


KINDS = (
    Kind("redis.fail-over", _fail_over_redis),
    Kind("postgres.fail-over", _fail_over_postgres),
)
