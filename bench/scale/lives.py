"""Rows brought through their life in this process, as relay and worker do it, while the clock runs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis

from bench.stage import Bench
from outbox.queries import query
from outbox.rq_jobs import Delivery
from outbox.runtime.postgres import Connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.publish import publish
from outbox_worker.claim import claim

QUEUE = "critical"
CLAIMED_AT_ONCE = 32
"""As many as a worker has handlers."""

_ENQUEUED = "SELECT id, delivery FROM outbox WHERE status = 'enqueued' ORDER BY id"


@dataclass(frozen=True)
class Lives:
    """What it took to bring rows through their life."""

    rows: int
    publishing: list[float]
    """Seconds per batch."""
    claiming: list[float]


def settings_of(bench: Bench, database_url: str) -> RelaySettings:
    """Returns a relay's default settings."""
    return RelaySettings(database_url=database_url, redis_url=bench.redis_url)


_WORKER = "0" * 32


def batches_of_a_window(bench: Bench) -> int:
    """Returns how many batches fill a window."""
    settings = settings_of(bench, bench.database_url)
    return bench.size(settings.window // settings.batch, 1)


def live(connection: Connection, client: redis.Redis, settings: RelaySettings, batches: int) -> Lives:
    """Brings rows of `QUEUE` from pending to done, as relay and worker do it, and takes the times."""
    publishing, claiming, rows = [], [], 0
    for _ in range(batches):
        begun = time.perf_counter()
        rows += publish(connection, client, QUEUE, settings)
        publishing.append(time.perf_counter() - begun)
    client.flushdb()
    deliveries = [Delivery(row["id"], row["delivery"]) for row in connection.execute(_ENQUEUED).fetchall()]
    for batch in _parts(deliveries, settings.batch):  # no more rows run at a time than a fleet of workers has handlers
        for some in _parts(batch, CLAIMED_AT_ONCE):
            begun = time.perf_counter()
            claim(connection, some, _WORKER, settings.lease)
            claiming.append(time.perf_counter() - begun)
        connection.execute(query("complete"), _done(batch))
    return Lives(rows, publishing, claiming)


def _done(deliveries: Sequence[Delivery]) -> dict[str, Any]:
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


def _parts(deliveries: Sequence[Delivery], size: int) -> list[Sequence[Delivery]]:
    return [deliveries[start : start + size] for start in range(0, len(deliveries), size)]
