"""Finds jobs of another application that the product lost from our Redis database."""

from collections.abc import Iterator

from tests.chaos.evidence import Evidence, Fault, ForeignJob
from tests.chaos.intervals import overlaps

_CONNECTIONS = frozenset({"redis.cut", "redis.tear", "redis.refuse", "redis.silence"})
_HARMLESS = _CONNECTIONS | {"redis.pause", "redis.full", "redis.read-only", "redis.hostile-jobs", "redis.foreign-jobs"}
"""Faults of Redis that lose none of its data."""
_AFTERMATH = 3.0
"""Seconds after a fault in which a relay may still repair its damage."""
_SHARED = frozenset({"rq:queue:default", "rq:queue:critical"})
"""Queues from which our workers take."""


def lost_foreign_jobs(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Yields the jobs that their owner can no longer find or run, and that no fault lost."""
    for job in evidence.foreign_jobs:
        may_be_in_hand = not _SHARED.isdisjoint(job.places)
        for at, place, has_hash in job.sightings:
            if place and has_hash:
                may_be_in_hand &= place in _SHARED
                continue
            causes = [fault for fault in evidence.faults if _may_lose(fault, may_be_in_hand=may_be_in_hand)]
            if not any(overlaps((job.written - _AFTERMATH, at), (fault.start, fault.end)) for fault in causes):
                yield _name(job), f"was missing at {at:.3f}" if not place else f"had no hash at {at:.3f}"
            break


def _may_lose(fault: Fault, *, may_be_in_hand: bool) -> bool:
    """Whether a fault may lose a foreign job: with Redis' data, or with the worker or connection that popped it."""
    if "redis" in fault.targets and fault.kind not in _HARMLESS:
        return True
    return may_be_in_hand and ("worker" in fault.targets or fault.kind in _CONNECTIONS)


def _name(job: ForeignJob) -> str:
    return f"job {job.id} in {job.places[0]}"
