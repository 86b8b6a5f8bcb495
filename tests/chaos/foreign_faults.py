"""Another application's own RQ and rq-scheduler on the same Redis database."""

import asyncio
import os
import random
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import redis
from rq import Queue
from rq_scheduler import Scheduler

from tests.chaos.evidence import ForeignJob
from tests.chaos.faults import Act, Kind
from tests.chaos.servers import Redis

_JOBS = 30
"""Of a fault, in queues and in rq-scheduler's set."""
_QUEUES = ("app", "reports", "default", "critical")
"""Two of its own, and two that bear the names of ours."""
_SCHEDULED = "rq:scheduler:scheduled_jobs"
_LOOKS = 10
_PAUSE = 0.3
"""Seconds between two looks: a job that is on its way from one place to the other is in none for a moment."""


async def _add_jobs(act: Act) -> None:
    """Adds jobs that would make a folder if they ran, and looks after a while where they are."""
    mark = act.stage.folder / "bombs" / f"foreign-{act.fault.number}"
    jobs: list[ForeignJob] = []
    for _ in range(2):
        jobs += await asyncio.to_thread(_enqueue, act.stage.redis.socket, act.draw, mark)
        await act.hold(1, 4)
    act.stage.foreign += jobs
    await look(act.stage.redis, jobs)
    places = [job.looks[-1][1] for job in jobs]
    aside = sum(place.startswith("outbox:foreign:") for place in places)
    act.fault.note = f"{len(jobs)} jobs, {aside} of them put aside, {places.count('')} gone"


def _enqueue(socket: Path, draw: random.Random, mark: Path) -> list[ForeignJob]:
    """Does what an application does, and returns the jobs that Redis took."""
    jobs = []
    with redis.Redis(unix_socket_path=str(socket), socket_timeout=5) as client, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # rq-scheduler's
        scheduler = Scheduler("app", connection=client)
        for _ in range(_JOBS // 2):
            name, due = draw.choice(_QUEUES), _naive_time(draw.choice((-30, 2, 3600)))
            way = draw.choice(("enqueue", "enqueue", "enqueue_at", "schedule"))
            try:
                if way == "enqueue":
                    job: Any = Queue(name, connection=client).enqueue(os.makedirs, str(mark))
                elif way == "enqueue_at":
                    job = scheduler.enqueue_at(due, os.makedirs, str(mark))
                else:
                    job = scheduler.schedule(due, os.makedirs, [str(mark)], interval=60)
            except redis.ResponseError:  # of a key of the wrong type, which no relay has repaired yet
                continue
            key = f"rq:queue:{name}" if way == "enqueue" else _SCHEDULED
            jobs.append(ForeignJob(job.id, (key, f"outbox:foreign:{key}"), time.time()))
    return jobs


def _naive_time(ahead: float) -> datetime:
    return datetime.now(UTC).replace(tzinfo=None) + timedelta(seconds=ahead)


async def look(client: Redis, jobs: Sequence[ForeignJob]) -> None:
    """Notes of each job where it is; of one that is nowhere, not before several looks."""
    keys = {key for job in jobs for key in job.places}
    for left in reversed(range(_LOOKS)):
        found = {key: await _members(client.client, key) for key in keys}
        missing = []
        for job in jobs:
            place = next((key for key in job.places if job.id.encode() in found[key]), "")
            if place or not left:
                has_hash = bool(await client.client.exists(f"rq:job:{job.id}"))
                job.looks.append((time.time(), place, has_hash))
            else:
                missing.append(job)
        if not (jobs := missing):
            return
        await asyncio.sleep(_PAUSE)


async def _members(client: Any, key: str) -> set[bytes]:
    kind = await client.type(key)
    if kind == b"list":
        return set(await client.lrange(key, 0, -1))
    return set(await client.zrange(key, 0, -1)) if kind == b"zset" else set()


KINDS = (Kind("redis.foreign-jobs", _add_jobs),)
