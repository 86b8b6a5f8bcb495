"""The relay's loop: its duties, each at its own pace, and its life with servers that come and go."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import psycopg

from outbox.backoff import reconnect_delay
from outbox.queries import query
from outbox.runtime import logs, pooler, postgres, redis_connection
from outbox.runtime.installation import Installation
from outbox.runtime.outage import Outage
from outbox.runtime.postgres import Connection
from outbox.runtime.redaction import one_line
from outbox.runtime.settings import RelaySettings
from outbox.runtime.stop import Stop
from outbox_relay.clock import Clock
from outbox_relay.drain import Drain
from outbox_relay.expiry import Expiry
from outbox_relay.hand_over import HandOver
from outbox_relay.repair import repair
from outbox_relay.rescue import IMPOSSIBLE_LEASE, Rescue
from outbox_relay.retention import Retention
from outbox_relay.schedule import Schedule
from outbox_relay.sweep import CLOCK_ERROR, Sweep
from outbox_relay.unserved_queues import warn_about_unserved_queues

UNHEARD_INTERVAL = 1.0
"""Seconds between two polls, at most, where no hint can be heard."""
SCHEDULE_INTERVAL = 1.0
"""Seconds between two looks for due jobs, unless one is known to come due earlier."""
RESCUE_INTERVAL = 1.0
"""Seconds between two looks, at most: so much later than its lease, and the rescue's settling time, a dead worker's row
is offered again."""
TOGETHER = 0.1
"""Seconds that a look may come early for a poll, so that one look serves all that are due about now."""
REPAIR_INTERVAL = 10.0
"""Seconds between two looks for foreign keys. A duty that fails because of one repairs at once."""
LOG_INTERVAL = 60.0
"""Seconds between two looks for rows that nobody will hand over, or take from Redis."""


@dataclass
class Duty:
    """One thing the relay does again and again."""

    name: str
    """What the log calls it."""
    step: Callable[[Connection], float]
    """Does it once and returns the seconds until it wants to be done again; infinite: once a look finds work for it."""
    needs_redis: bool = False
    due: float = 0.0
    """When it is to be done next, by the monotonic clock."""
    refusals: int = 0
    """How many times in a row Postgres has refused it."""
    tell_at: float = 0.0
    """When the log may say that again."""


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

    def __init__(self, settings: RelaySettings, stop: Stop) -> None:
        self._settings = settings
        self._stop = stop
        self._postgres = Outage("Postgres")
        self._redis = Outage("Redis")
        self._redis_retry_at = 0.0
        self._redis_checked = False
        self._client = redis_connection.connect(settings.redis_url, "outbox-relay")
        self._installation = Installation(self._client)
        self._schedule = Schedule(self._client, list(settings.queues))
        self._clock = Clock()
        self._rescue = Rescue(settings.lease)
        self._has_logged_polling = False
        self._is_hinted = False
        """Whether a hint has come since the last wait."""
        self._hand_overs = {queue: HandOver(self._client, queue, settings) for queue in settings.queues}
        self._sweep = Sweep(self._client, settings)
        # What is not urgent keeps its turn over an outage, after which there is other work to do.
        self._unhurried = [
            Duty("retention", Retention(settings).step),
            Duty("look for unserved queues", self._warn_about_unserved_queues),
        ]
        if settings.unverified_retention is not None:
            expiry = Expiry(settings.unverified_retention)
            self._unhurried.append(Duty("expiry of unverified users", expiry.step))

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
        while not self._stop.is_requested():
            try:
                with (
                    pooler.connect_checked(
                        self._settings.database_url, "outbox relay", pooled=self._settings.transaction_pooling
                    ) as connection,
                    Drain(self._client, self._settings) as drain,
                ):
                    self._serve(connection, drain)
            except psycopg.Error as error:
                if not postgres.may_pass(error):
                    raise
                self._rescue.pause()  # what this relay could not write, workers may not have been able to either
                self._stop.wait(self._postgres.away(error))

    def _serve(self, connection: Connection, drain: Drain) -> None:
        postgres.check_migrated(connection)
        self._installation.identify(connection)
        self._sweep.forget()
        poll_interval = self._settings.poll_interval
        if not self._listen(connection):
            poll_interval = min(poll_interval, UNHEARD_INTERVAL)
        moving = Duty("move of due jobs", self._move_due, needs_redis=True)
        handing = {
            queue: Duty(f"hand-over of {queue}", partial(self._hand_over, hand_over, drain, moving), needs_redis=True)
            for queue, hand_over in self._hand_overs.items()
        }
        sweeping = Duty("sweep", self._sweep.step, needs_redis=True)
        polls = [
            *(Poll(duty, partial(_has_pending, queue), poll_interval) for queue, duty in handing.items()),
            Poll(moving, itemgetter("enqueued"), SCHEDULE_INTERVAL),
            Poll(sweeping, itemgetter("unclaimed"), self._settings.sweep_interval),
        ]
        duties = [
            Duty("look", partial(self._look, polls)),
            *handing.values(),
            moving,
            sweeping,
            Duty("repair", self._repair, needs_redis=True),
            Duty("reconnect", self._reconnect, needs_redis=True),
            *self._unhurried,
        ]
        while not self._stop.is_requested():
            for duty in duties:
                if not self._stop.is_requested() and duty.due <= time.monotonic():
                    again = self._do(duty, connection)
                    duty.due = time.monotonic() + again
            self._postgres.back()  # only now: a server may let us in and still refuse to write
            if self._wait(connection, min(duty.due for duty in duties) - time.monotonic()):
                for duty in handing.values():
                    duty.due = 0.0

    def _listen(self, connection: Connection) -> bool:
        """Asks for hints and returns whether they can be heard; where not, says so once."""
        if self._settings.transaction_pooling:
            if not self._has_logged_polling:
                logs.get().info("polling without LISTEN", why="OUTBOX_TRANSACTION_POOLING is set")
                pooler.warn_about_missing_settings(connection)
                self._has_logged_polling = True
            return False
        try:
            connection.add_notify_handler(self._note_hint)
            connection.execute(query("listen"))
        except psycopg.Error as error:
            if connection.closed or isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
                raise  # an outage, or a standby
            if not self._has_logged_polling:
                logs.get().warning("polling without LISTEN", why=one_line(error))
                self._has_logged_polling = True
            return False
        return True

    def _do(self, duty: Duty, connection: Connection) -> float:
        """Does a duty and returns the seconds until its next turn; where Postgres refuses it, the others go on."""
        try:
            again = self._do_with_redis(duty, connection) if duty.needs_redis else duty.step(connection)
        except psycopg.Error as error:
            if postgres.is_outage(error) or connection.closed:
                raise
            return self._put_off(duty, error)
        duty.refusals = 0
        return again

    def _put_off(self, duty: Duty, error: psycopg.Error) -> float:
        duty.refusals += 1
        delay = reconnect_delay(duty.refusals)
        if (error.sqlstate or "").startswith(("53", "58")):
            self._rescue.pause()  # a full disk, say: workers may not be able to write either
        if time.monotonic() >= duty.tell_at:
            logs.get().warning("duty refused", duty=duty.name, error=one_line(error), next_try=round(delay, 1))
            duty.tell_at = time.monotonic() + LOG_INTERVAL
        return delay

    def _do_with_redis(self, duty: Duty, connection: Connection) -> float:
        if (wait := self._redis_retry_at - time.monotonic()) > 0:
            return wait
        try:
            if not self._redis_checked:
                redis_connection.check_supported(self._client)
                self._repair(connection)
                self._redis_checked = True
            again = duty.step(connection)
        except redis_connection.AWAY as error:
            self._redis_checked = False  # it may come back as another
            redis_connection.drop_connections(self._client)
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
        if not self._is_hinted and postgres.has_heard(connection, min(max(seconds, 0.0), 1.0)):
            connection.pgconn.consume_input()
            # All that have arrived: whatever is left there would wake it once more, one by one.
            while connection.pgconn.notifies():
                self._is_hinted = True
        was_hinted, self._is_hinted = self._is_hinted, False
        return was_hinted

    def _note_hint(self, _: psycopg.Notify) -> None:
        """Takes note of a hint that came with a statement's answer, of which psycopg would keep the whole payload."""
        self._is_hinted = True

    @staticmethod
    def _hand_over(hand_over: HandOver, drain: Drain, moving: Duty, connection: Connection) -> float:
        again = hand_over.step(connection, drain)
        if again < math.inf:
            moving.due = 0.0  # one of the rows may come due before the next look
        return again

    def _look(self, polls: list[Poll], connection: Connection) -> float:
        """Looks in one statement for all that there is to do, and rescues first: every other duty may hold that up."""
        begun = time.monotonic()
        settings = self._settings
        found = connection.execute(
            query("find_work"),
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
        redis_connection.drop_connections(self._client)
        return redis_connection.LIFETIME

    def _warn_about_unserved_queues(self, connection: Connection) -> float:
        warn_about_unserved_queues(connection, self._settings)
        return LOG_INTERVAL


def _has_pending(queue: str, found: dict[str, Any]) -> bool:
    return queue in found["pending"]
