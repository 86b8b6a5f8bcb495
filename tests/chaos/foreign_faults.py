"""Injects jobs of another application's RQ and rq-scheduler into the same Redis database."""

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
from tests.chaos.faults import Injection, Kind
from tests.chaos.servers import Redis

_JOBS = 30
"""Jobs per fault, in queues and in rq-scheduler's set."""
_QUEUES = ("app", "reports", "default", "critical")
"""Two queues of its own, and two with the names of ours."""
_SCHEDULED = "rq:scheduler:scheduled_jobs"
_LOOKS = 10
_PAUSE = 0.3
"""Seconds between two looks: a job that is being moved is nowhere for a moment."""


async def _add_jobs(injection: Injection) -> None:
    """Adds jobs that would create a folder if they ran, and later records where they are."""
    folder = injection.system.folder / "bombs" / f"foreign-{injection.fault.number}"
    jobs: list[ForeignJob] = []
    for _ in range(2):
        jobs += await asyncio.to_thread(_enqueue, injection.system.redis.socket, injection.draw, folder)
        await injection.hold(1, 4)
    injection.system.foreign_jobs += jobs
    await record_sightings(injection.system.redis, jobs)
    places = [job.sightings[-1][1] for job in jobs]
    aside = sum(place.startswith("outbox:foreign:") for place in places)
    injection.fault.note = f"{len(jobs)} jobs, {aside} of them put aside, {places.count('')} gone"


def _enqueue(socket: Path, draw: random.Random, folder: Path) -> list[ForeignJob]:
    """Enqueues jobs as an application does, and returns those that Redis accepted."""
    jobs = []
    with redis.Redis(unix_socket_path=str(socket), socket_timeout=5) as client, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # rq-scheduler's
        scheduler = Scheduler("app", connection=client)
        for _ in range(_JOBS // 2):
            name, due = draw.choice(_QUEUES), _naive_time(draw.choice((-30, 2, 3600)))
            way = draw.choice(("enqueue", "enqueue", "enqueue_at", "schedule"))
            try:
                if way == "enqueue":
                    job: Any = Queue(name, connection=client).enqueue(os.makedirs, str(folder))
                elif way == "enqueue_at":
                    job = scheduler.enqueue_at(due, os.makedirs, str(folder))
                else:
                    job = scheduler.schedule(due, os.makedirs, [str(folder)], interval=60)
            except redis.ResponseError:  # a key has the wrong type, and no relay has repaired it yet
                continue
            key = f"rq:queue:{name}" if way == "enqueue" else _SCHEDULED
            jobs.append(ForeignJob(job.id, (key, f"outbox:foreign:{key}"), time.time()))
    return jobs


def _naive_time(ahead: float) -> datetime:
    return datetime.now(UTC).replace(tzinfo=None) + timedelta(seconds=ahead)


async def record_sightings(client: Redis, jobs: Sequence[ForeignJob]) -> None:
    """Records where each job is; records that a job is nowhere only after several looks."""
    keys = {key for job in jobs for key in job.places}
    for left in reversed(range(_LOOKS)):
        members = {key: await _members(client.client, key) for key in keys}
        missing = []
        for job in jobs:
            place = next((key for key in job.places if job.id.encode() in members[key]), "")
            if place or not left:
                has_hash = bool(await client.client.exists(f"rq:job:{job.id}"))
                job.sightings.append((time.time(), place, has_hash))
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
