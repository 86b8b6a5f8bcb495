"""Takes rows through their life in this process with the code of relay and worker, and times it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis

from bench.testbed import Bench
from outbox.queries import query
from outbox.rq_jobs import Delivery
from outbox.runtime.postgres import Connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.publish import publish
from outbox_worker.claim import claim

QUEUE = "critical"
CLAIMED_AT_ONCE = 32
"""Rows per claim: the default number of handler threads of a worker."""

_WORKER = "0" * 32
_ENQUEUED = "SELECT id, delivery FROM outbox WHERE status = 'enqueued' ORDER BY id"


@dataclass(frozen=True)
class LifecycleTimes:
    """The times of one `run_lifecycle`."""

    rows: int
    """Rows handed over."""
    publish_times: list[float]
    """Seconds of each hand-over of a batch."""
    claim_times: list[float]
    """Seconds of each claim of `CLAIMED_AT_ONCE` rows."""


def relay_settings(bench: Bench, database_url: str) -> RelaySettings:
    """Returns the default settings of a relay on a database."""
    return RelaySettings(database_url=database_url, redis_url=bench.redis_url)


def batches_per_window(bench: Bench) -> int:
    """Returns the number of batches that fill a window."""
    settings = relay_settings(bench, bench.database_url)
    return bench.size(settings.window // settings.batch, 1)


def run_lifecycle(connection: Connection, client: redis.Redis, settings: RelaySettings, batches: int) -> LifecycleTimes:
    """Takes rows of `QUEUE` from pending to done, as relay and worker do, and returns the times."""
    publish_times, claim_times, rows = [], [], 0
    for _ in range(batches):
        begun = time.perf_counter()
        rows += publish(connection, client, QUEUE, settings)
        publish_times.append(time.perf_counter() - begun)
    client.flushdb()
    deliveries = [Delivery(row["id"], row["delivery"]) for row in connection.execute(_ENQUEUED).fetchall()]
    for batch in _split(deliveries, settings.batch):  # limits the rows that are running to what a fleet of workers has
        for chunk in _split(batch, CLAIMED_AT_ONCE):
            begun = time.perf_counter()
            claim(connection, chunk, _WORKER, settings.lease)
            claim_times.append(time.perf_counter() - begun)
        connection.execute(query("complete"), _complete_arguments(batch))
    return LifecycleTimes(rows, publish_times, claim_times)


def _complete_arguments(deliveries: Sequence[Delivery]) -> dict[str, Any]:
    count = len(deliveries)
    return {
        "ids": [delivery.row_id for delivery in deliveries],
        "deliveries": [delivery.number for delivery in deliveries],
        "worker": _WORKER,
        "statuses": ["done"] * count,
        "delays": [0.0] * count,
        "attempts": [1] * count,
        "errors": [None] * count,
        "unhandled": [],
    }


def _split(deliveries: Sequence[Delivery], size: int) -> list[Sequence[Delivery]]:
    return [deliveries[start : start + size] for start in range(0, len(deliveries), size)]
