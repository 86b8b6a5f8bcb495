"""The relay's loop: its duties, each at its own pace, and its life with servers that come and go."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from threading import Event
from typing import Any

import psycopg

from outbox import logs, pooler, postgres
from outbox import redis as outbox_redis
from outbox.installation import Installation
from outbox.outage import Outage, one_line
from outbox.postgres import Connection
from outbox.queries import query
from outbox.settings import RelaySettings
from relay.clock import Clock
from relay.drain import Drain
from relay.publish import publish
from relay.repair import repair
from relay.rescue import IMPOSSIBLE_LEASE, Rescue
from relay.retention import BATCH as RETENTION_BATCH
from relay.retention import retention
from relay.schedule import Schedule
from relay.sweep import CLOCK_ERROR, Sweep
from relay.unserved import tell_of_unserved_queues

UNHEARD_INTERVAL = 1.0
"""Seconds between two polls, at most, where no hint can be heard."""
REFILL_INTERVAL = 0.1
"""Seconds until the next batch where the last was not full: what has no room in the window now may have it then."""
SCHEDULE_INTERVAL = 1.0
"""Seconds between two looks for due jobs, unless one is known to come due earlier."""
RESCUE_INTERVAL = 1.0
"""Seconds between two looks, at most: so much later than its lease, and the rescue's settling time, a dead worker's row
is offered again."""
TOGETHER = 0.1
"""Seconds that a look may come early for a poll, so that one look serves all that are due about now."""
REPAIR_INTERVAL = 10.0
"""Seconds between two looks for strangers' keys; whatever one of them makes fail, repairs at once."""
RETENTION_INTERVAL = 60.0
"""Seconds between two deletions of old rows, unless there was a full batch of them."""
TELL_INTERVAL = 60.0
"""Seconds between two looks for rows that nobody will hand over, or take from Redis."""


@dataclass
class Duty:
    """One thing the relay does again and again."""

    step: Callable[[Connection], float]
    """Does it once and returns the seconds until it wants to be done again; infinite: once a look finds work for it."""
    needs_redis: bool = False
    due: float = 0.0
    """When it is to be done next, by the monotonic clock."""


@dataclass
class Poll:
    """What makes a duty due that waits for a look to find work for it."""

    duty: Duty
    finds: Callable[[dict[str, Any]], bool]
    """Whether there is any, by what the statement `look` has returned."""
    interval: float
    """Seconds between two looks for it."""
    due: float = 0.0
    """When to look next; hints and the duty itself do not put it off."""


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
        self._installation = Installation(self._client)
        self._schedule = Schedule(self._client, list(settings.queues))
        self._clock = Clock()
        self._rescue = Rescue(settings.lease)
        self._told_of_polling = False

    def run(self) -> None:
        """Works until it is told to stop, through outages of either server.

        Raises:
            UnsupportedDatabaseError: the database is not in UTF-8.
            NotMigratedError: it lacks migrations.
            SettingsError: a pooler in transaction mode stands before Postgres, and the settings do not say so.
            UnsupportedRedisError: Redis is one that cannot serve.
            SharedRedisError: another installation uses it.
        """
        logs.get().info("started", queues=self._settings.queues)
        try:
            self._work()
        finally:
            self._client.close()
            logs.get().info("stopped")

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                with (
                    pooler.connect_checked(
                        self._settings.database_url, "outbox relay", pooled=self._settings.transaction_pooling
                    ) as connection,
                    Drain(self._client, self._settings) as drain,
                ):
                    self._serve(connection, drain)
            except postgres.AWAY as error:
                self._rescue.pause()  # what this relay could not write, workers may not have been able to either
                self._stop.wait(self._postgres.away(error))

    def _serve(self, connection: Connection, drain: Drain) -> None:
        postgres.check_migrated(connection)
        self._installation.identify(connection)
        poll_interval = self._settings.poll_interval
        if not self._listen(connection):
            poll_interval = min(poll_interval, UNHEARD_INTERVAL)
        moving = Duty(self._move_due, needs_redis=True)
        publishing = {
            queue: Duty(self._publish(queue, moving, drain), needs_redis=True) for queue in self._settings.queues
        }
        sweeping = Duty(Sweep(self._client, self._settings).step, needs_redis=True)
        polls = [
            *(Poll(duty, partial(_has_pending, queue), poll_interval) for queue, duty in publishing.items()),
            Poll(moving, itemgetter("enqueued"), SCHEDULE_INTERVAL),
            Poll(sweeping, itemgetter("unclaimed"), self._settings.sweep_interval),
        ]
        duties = [
            Duty(partial(self._look, polls)),
            *publishing.values(),
            moving,
            sweeping,
            Duty(self._repair, needs_redis=True),
            Duty(self._reconnect, needs_redis=True),
            Duty(self._retention),
            Duty(self._tell_of_unserved_queues),
        ]
        while not self._stop.is_set():
            for duty in duties:
                if not self._stop.is_set() and duty.due <= time.monotonic():
                    again = self._do(duty, connection)
                    duty.due = time.monotonic() + again
            self._postgres.back()  # only now: a server may let us in and still refuse to write
            if self._wait(connection, min(duty.due for duty in duties) - time.monotonic()):
                for duty in publishing.values():
                    duty.due = 0.0

    def _listen(self, connection: Connection) -> bool:
        """Asks for hints and returns whether they can be heard; where not, says so once."""
        if self._settings.transaction_pooling:
            if not self._told_of_polling:
                logs.get().info("polling without LISTEN", why="OUTBOX_TRANSACTION_POOLING is set")
                pooler.tell_of_missing_settings(connection)
                self._told_of_polling = True
            return False
        try:
            connection.execute(query("listen"))
        except psycopg.Error as error:
            if connection.closed or isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
                raise  # an outage, or a standby
            if not self._told_of_polling:
                logs.get().warning("polling without LISTEN", why=one_line(error))
                self._told_of_polling = True
            return False
        return True

    def _do(self, duty: Duty, connection: Connection) -> float:
        if not duty.needs_redis:
            return duty.step(connection)
        if (wait := self._redis_retry_at - time.monotonic()) > 0:
            return wait
        try:
            if not self._redis_checked:
                outbox_redis.check_supported(self._client)
                self._repair(connection)
                self._redis_checked = True
            again = duty.step(connection)
        except outbox_redis.AWAY as error:
            self._redis_checked = False  # it may come back as another
            outbox_redis.drop_connections(self._client)
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
        # All that have arrived: whatever is left there would wake it once more, one by one.
        return bool(list(connection.notifies(timeout=min(max(seconds, 0.0), 1.0), stop_after=1)))

    def _publish(self, queue: str, moving: Duty, drain: Drain) -> Callable[[Connection], float]:
        backlog = False

        def step(connection: Connection) -> float:
            nonlocal backlog
            if not backlog:
                rows = publish(connection, self._client, queue, self._settings)
                if not rows:
                    return math.inf
                backlog = rows == self._settings.batch
            moving.due = 0.0  # one of them may come due before the next look
            backlog = backlog and drain.drain(connection, queue)
            return 0 if backlog else REFILL_INTERVAL

        return step

    def _look(self, polls: list[Poll], connection: Connection) -> float:
        """Looks in one statement for all that there is to do, and rescues first: every other duty may hold that up."""
        begun = time.monotonic()
        settings = self._settings
        found = connection.execute(
            query("look"),
            {
                "queues": list(settings.queues),
                "horizon": settings.horizon,
                "grace": settings.sweep_grace,
                "clock_error": CLOCK_ERROR,
                "impossible_lease": IMPOSSIBLE_LEASE,
            },
        ).fetchone()
        assert found is not None
        self._clock.set(found["now"])
        self._rescue.looked(found["now"], begun, RESCUE_INTERVAL)
        rescue_in = RESCUE_INTERVAL
        if found["expired"]:
            rescue_in = min(rescue_in, self._rescue.step(connection))
        else:
            self._rescue.forget()
        for poll in polls:
            if poll.due <= begun + TOGETHER:
                poll.due = begun + poll.interval
                if poll.duty.due == math.inf and poll.finds(found):
                    poll.duty.due = 0.0
        return min(begun + rescue_in, *(poll.due for poll in polls)) - time.monotonic()

    def _move_due(self, _: Connection) -> float:
        upcoming = self._schedule.move_due(self._clock.now())
        return math.inf if upcoming is None else min(SCHEDULE_INTERVAL, upcoming - self._clock.now())

    def _repair(self, _: Connection) -> float:
        repair(self._client, list(self._settings.queues))
        self._installation.announce()
        return REPAIR_INTERVAL

    def _reconnect(self, _: Connection) -> float:
        outbox_redis.drop_connections(self._client)
        return outbox_redis.LIFETIME

    def _retention(self, connection: Connection) -> float:
        try:
            deleted = retention(connection, self._settings)
        except psycopg.IntegrityError as error:
            # A foreign key of somebody's to the outbox: only they can say what is to become of their rows.
            logs.get().error("done rows cannot be deleted", error=error.diag.message_primary)
            return RETENTION_INTERVAL
        return 0 if deleted == RETENTION_BATCH else RETENTION_INTERVAL

    def _tell_of_unserved_queues(self, connection: Connection) -> float:
        tell_of_unserved_queues(connection, self._settings)
        return TELL_INTERVAL


def _has_pending(queue: str, found: dict[str, Any]) -> bool:
    return queue in found["pending"]
