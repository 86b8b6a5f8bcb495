"""The relay's loop: its duties, each at its own pace, and its life with servers that come and go."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

from outbox import logs, postgres
from outbox import redis as outbox_redis
from outbox.outage import Outage
from outbox.postgres import Connection
from outbox.queries import query
from outbox.settings import RelaySettings
from relay.clock import Clock
from relay.publish import publish
from relay.repair import repair
from relay.rescue import rescue
from relay.retention import BATCH as RETENTION_BATCH
from relay.retention import retention
from relay.schedule import Schedule
from relay.sweep import Sweep
from relay.unserved import tell_of_unserved_queues

SCHEDULE_INTERVAL = 1.0
"""Seconds between two looks for due jobs, unless one is known to come due earlier."""
RESCUE_INTERVAL = 1.0
"""Seconds between two looks for expired leases: how much later than its lease a dead worker's row is offered again."""
REPAIR_INTERVAL = 10.0
"""Seconds between two looks for strangers' keys; whatever one of them makes fail, repairs at once."""
RETENTION_INTERVAL = 60.0
"""Seconds between two deletions of old rows, unless there was a full batch of them."""
TELL_INTERVAL = 60.0
"""Seconds between two looks for rows that nobody will hand over."""


@dataclass
class Duty:
    """One thing the relay does again and again."""

    step: Callable[[Connection], float]
    """Does it once and returns the seconds until it wants to be done again."""
    needs_redis: bool = False
    due: float = 0.0
    """When it is to be done next, by the monotonic clock."""


class Relay:
    """One relay process. Any number of them may run side by side."""

    def __init__(self, settings: RelaySettings, stop: Event) -> None:
        self._settings = settings
        self._stop = stop
        self._postgres = Outage("Postgres")
        self._redis = Outage("Redis")
        self._redis_retry_at = 0.0
        self._redis_checked = False
        self._client = outbox_redis.connect(settings.redis_url, "outbox-relay")
        self._schedule = Schedule(self._client, list(settings.queues))
        self._clock = Clock()
        self._looked_at = -math.inf
        self._rescues_from = 0.0

    def run(self) -> None:
        """Works until it is told to stop, through outages of either server.

        Raises:
            NotMigratedError: the database lacks migrations.
            UnsupportedRedisError: Redis is one that cannot serve.
        """
        logs.get().info("started", queues=self._settings.queues)
        while not self._stop.is_set():
            try:
                with postgres.connect(self._settings.database_url, "outbox relay") as connection:
                    self._serve(connection)
            except postgres.AWAY as error:
                self._stop.wait(self._postgres.away(error))
        self._client.close()
        logs.get().info("stopped")

    def _serve(self, connection: Connection) -> None:
        postgres.check_migrated(connection)
        connection.execute(query("listen"))
        moving = Duty(self._move_due, needs_redis=True)
        publishing = [Duty(self._publish(queue, moving), needs_redis=True) for queue in self._settings.queues]
        duties = [
            *publishing,
            moving,
            Duty(Sweep(self._client, self._settings).step, needs_redis=True),
            Duty(self._repair, needs_redis=True),
            Duty(self._rescue),
            Duty(self._retention),
            Duty(self._tell_of_unserved_queues),
        ]
        while not self._stop.is_set():
            for duty in duties:
                if not self._stop.is_set() and duty.due <= time.monotonic():
                    duty.due = time.monotonic() + self._do(duty, connection)
            self._postgres.back()  # only now: a server may let us in and still refuse to write
            if self._wait(connection, min(duty.due for duty in duties) - time.monotonic()):
                for duty in publishing:
                    duty.due = 0.0

    def _do(self, duty: Duty, connection: Connection) -> float:
        if not duty.needs_redis:
            return duty.step(connection)
        if (wait := self._redis_retry_at - time.monotonic()) > 0:
            return wait
        try:
            if not self._redis_checked:
                outbox_redis.check_supported(self._client)
                repair(self._client, list(self._settings.queues))
                self._redis_checked = True
            again = duty.step(connection)
        except outbox_redis.AWAY as error:
            self._redis_checked = False  # it may come back as another
            delay = self._redis.away(error)
            self._redis_retry_at = time.monotonic() + delay
            return delay
        self._redis.back()
        return again

    def _wait(self, connection: Connection, seconds: float) -> bool:
        """Waits for a duty to come due, or for the hint that rows were committed; returns whether that came.

        It looks for the hint even where a duty is due already: while one queue's batches are full, that is always so,
        and another queue's rows must not wait for the next poll.
        """
        return any(True for _ in connection.notifies(timeout=min(max(seconds, 0.0), 1.0), stop_after=1))

    def _publish(self, queue: str, moving: Duty) -> Callable[[Connection], float]:
        def step(connection: Connection) -> float:
            rows = publish(connection, self._client, queue, self._settings)
            if rows:
                moving.due = 0.0  # one of them may come due before the next look
            return 0 if rows >= self._settings.batch else self._settings.poll_interval

        return step

    def _move_due(self, connection: Connection) -> float:
        if self._clock.is_stale():
            told = connection.execute(query("now")).fetchone()
            assert told is not None
            self._clock.set(told["now"])
        upcoming = self._schedule.move_due(self._clock.now())
        return SCHEDULE_INTERVAL if upcoming is None else min(SCHEDULE_INTERVAL, upcoming - self._clock.now())

    def _repair(self, _: Connection) -> float:
        repair(self._client, list(self._settings.queues))
        return REPAIR_INTERVAL

    def _rescue(self, connection: Connection) -> float:
        """Rescues, unless nobody came here for a while: Postgres was away, or stalled, or this process was paused.

        Then the living workers may not have been able to renew their leases either, and first get a lease's length to
        do so. They renew every third of it: what is shorter than another third has cost none of them its lease.
        """
        now, lease = time.monotonic(), self._settings.lease
        if now - self._looked_at > RESCUE_INTERVAL + lease / 3:
            self._rescues_from = now + lease
        self._looked_at = now
        if now >= self._rescues_from:
            rescue(connection, patience=lease / 3)
        return RESCUE_INTERVAL

    def _retention(self, connection: Connection) -> float:
        deleted = retention(connection, self._settings)
        return 0 if deleted == RETENTION_BATCH else RETENTION_INTERVAL

    def _tell_of_unserved_queues(self, connection: Connection) -> float:
        tell_of_unserved_queues(connection, self._settings)
        return TELL_INTERVAL
