"""Hands over a backlog, two batches at a time: Postgres works on one while Redis takes the other."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import psycopg
import redis
from psycopg.rows import scalar_row

from outbox.queries import query
from outbox.runtime import postgres
from outbox.runtime.postgres import Connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.publish import publish

DRAIN_TIME = 0.25
"""Seconds after which neither publisher begins another batch: the relay's other duties may be due."""
SHARES = 16
"""The room of a window is divided by this, and each publisher fills one share before the room is counted again. Rows
that other relays hand over in that time are not seen, so eight relays that count at the same moment just fill it."""
RETRY = 60.0
"""Seconds until the next try to open the second connection after one that failed: a try may take 5 s."""


class Drain:
    """A second publisher beside the relay's own. It gets its thread and its connection at the first backlog."""

    def __init__(self, client: redis.Redis, settings: RelaySettings) -> None:
        self._client = client
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="drain")
        self._closing = ExitStack()
        self._second: Connection | None = None
        self._retry_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        self._closing.close()

    def drain(self, connection: Connection, queue: str, left_out: Sequence[int] = ()) -> bool:
        """Hands over a queue's rows for `DRAIN_TIME` seconds or until its window is full, except those in `left_out`.

        Returns:
            Whether to go on: neither publisher ran out of rows, and the window has room for a batch.

        Raises:
            redis.RedisError: Redis did not take a batch.
            psycopg.Error: Postgres is away, or refuses a batch.
        """
        if self._second is None and time.monotonic() >= self._retry_at:
            self._open_second()
        asked = {"queue": queue, "window": self._settings.window}
        (room,) = connection.cursor(row_factory=scalar_row).execute(query("window_room"), asked)
        if self._second is None:
            return self._publish_all(connection, queue, room, left_out)
        try:
            other = self._thread.submit(self._publish_all, self._second, queue, room, left_out)
        except RuntimeError:  # no thread can be started: the relay's own publisher goes on alone
            self._thread.shutdown(wait=False, cancel_futures=True)  # it would run the refused call later
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="drain")
            return self._publish_all(connection, queue, room, left_out)
        try:
            more = self._publish_all(connection, queue, room, left_out)
        finally:
            wait([other])
        return other.result() and more

    def _open_second(self) -> None:
        settings = self._settings
        try:
            self._second = self._closing.enter_context(
                postgres.connect(settings.database_url, "outbox relay drains", pooled=settings.transaction_pooling)
            )
        except psycopg.OperationalError:  # too many connections, for example: the relay's own publisher goes on alone
            self._retry_at = time.monotonic() + RETRY

    def _publish_all(self, connection: Connection, queue: str, room: int, left_out: Sequence[int]) -> bool:
        if room < self._settings.batch:
            return False
        share = max(1, room // SHARES)
        ends = time.monotonic() + DRAIN_TIME
        while True:
            limit = min(self._settings.batch, share)
            rows = publish(connection, self._client, queue, self._settings, room=room, limit=limit, left_out=left_out)
            share -= rows
            room -= rows
            if rows < limit:
                return False
            if not share or time.monotonic() >= ends:
                return True
