"""Hands over one queue's rows: batch by batch, and two batches at a time while there is a backlog."""

from functools import partial

import redis

from outbox.runtime.postgres import Connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.batches import Batches
from outbox_relay.drain import Drain
from outbox_relay.publish import publish

REFILL_INTERVAL = 0.1
"""Seconds until the next batch after one that was not full: the window may have room again by then."""
LEFT_OUT = 10.0
"""Seconds until the next try to hand over a row that was refused."""


class HandOver:
    """One queue's hand-over. It outlives connections, so that a batch that was too large is smaller on the next."""

    def __init__(self, client: redis.Redis, queue: str, settings: RelaySettings) -> None:
        self._client = client
        self._queue = queue
        self._settings = settings
        self._batches = Batches[int](settings.batch, "rows cannot be handed over", LEFT_OUT)
        self._has_backlog = False

    def step(self, connection: Connection, drain: Drain) -> float | None:
        """Hands over rows for at most about `drain.DRAIN_TIME` seconds.

        Returns:
            The seconds until the next step; None if no rows are left.

        Raises:
            redis.RedisError: Redis did not take a batch.
            psycopg.Error: Postgres is away, or refuses for a reason that is not in the rows.
        """
        had_backlog, self._has_backlog = self._has_backlog, False
        if not had_backlog:
            written = self._batches.write(connection, partial(self._publish, connection))
            if written is None:
                return 0.0
            rows, most = written
            if not rows:
                return None
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
