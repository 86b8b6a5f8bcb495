"""Handing over one queue's rows: batch by batch, and two at a time while there is a backlog."""

import math
from functools import partial

import redis

from outbox.runtime.postgres import Connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.batches import Batches
from outbox_relay.drain import Drain
from outbox_relay.publish import publish

REFILL_INTERVAL = 0.1
"""Seconds until the next batch where the last was not full: what has no room in the window now may have it then."""
LEFT_OUT = 10.0
"""Seconds until a row is tried again that cannot be handed over."""


class HandOver:
    """One queue's hand-over. It outlives connections: a batch that was cut is tried smaller on the next."""

    def __init__(self, client: redis.Redis, queue: str, settings: RelaySettings) -> None:
        self._client = client
        self._queue = queue
        self._settings = settings
        self._batches = Batches[int](settings.batch, "rows cannot be handed over", LEFT_OUT)
        self._has_backlog = False

    def step(self, connection: Connection, drain: Drain) -> float:
        """Hands over what it can in about `drain.DRAIN_TIME` seconds.

        Returns:
            The seconds until it wants to go on; infinite: once a look finds more rows.

        Raises:
            redis.RedisError: Redis did not take a batch.
            psycopg.Error: Postgres is away, or refuses for what is no row's fault.
        """
        had_backlog, self._has_backlog = self._has_backlog, False
        if not had_backlog:
            written = self._batches.write(connection, partial(self._publish, connection))
            if written is None:
                return 0.0
            rows, most = written
            if not rows:
                return math.inf
            if rows < self._settings.batch:
                return REFILL_INTERVAL if rows < most else 0.0
        left_out = self._batches.left_out.rows()
        goes_on = self._batches.write(connection, lambda _: drain.drain(connection, self._queue, left_out))
        self._has_backlog = goes_on is True
        return REFILL_INTERVAL if goes_on is False else 0.0

    def _publish(self, connection: Connection, most: int) -> tuple[int, int]:
        batches = self._batches
        left_out, tried = batches.left_out.rows(), batches.tried
        given = (connection, self._client, self._queue, self._settings)
        return publish(*given, limit=most, left_out=left_out, tried=tried), most
