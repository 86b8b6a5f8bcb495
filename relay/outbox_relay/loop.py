"""The relay's loop: does each duty when it is due, and goes on through outages of either server."""

import math
import time
from collections.abc import Callable
from functools import partial

import psycopg

from outbox.backoff import reconnect_delay
from outbox.queries import query
from outbox.runtime import logs, pooler, postgres, redis_connection, schema
from outbox.runtime.installation import Installation
from outbox.runtime.outage import Outage
from outbox.runtime.postgres import Connection
from outbox.runtime.redaction import one_line
from outbox.runtime.settings import RelaySettings
from outbox.runtime.stop import Stop
from outbox_relay import answer_retention, expiry, retention, unserved_queues
from outbox_relay.clock import Clock
from outbox_relay.drain import Drain
from outbox_relay.duty import Duty
from outbox_relay.expiry import Expiry
from outbox_relay.hand_over import HandOver
from outbox_relay.look import Work, find_work
from outbox_relay.repair import repair
from outbox_relay.rescue import RESCUE_INTERVAL, Rescue
from outbox_relay.retention import Retention
from outbox_relay.schedule import Schedule
from outbox_relay.sweep import Sweep

UNHEARD_INTERVAL = 1.0
"""Upper bound of the seconds between two looks for pending rows if no hint can be heard."""
SCHEDULE_INTERVAL = 1.0
"""Seconds between two looks for due jobs, unless one is known to come due earlier."""
LOOK_EARLY = 0.1
"""Seconds that a look may come early for a duty, so that one look serves all duties that are due about now."""
REPAIR_INTERVAL = 10.0
"""Seconds between two checks for foreign keys. After an outage of Redis, the first check is at once."""
LOG_INTERVAL = 60.0
"""Seconds between two log lines about the same refused duty."""


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
        # These are not urgent: they are not due earlier because of an outage, after which there is other work to do.
        self._unhurried = [
            Duty("retention", Retention(settings).step, retention.INTERVAL),
            Duty("retention of answers", self._delete_old_answers, answer_retention.INTERVAL),
            Duty("look for unserved queues", self._warn_about_unserved_queues, unserved_queues.INTERVAL),
        ]
        if settings.unverified_retention is not None:
            step = Expiry(settings.unverified_retention).step
            self._unhurried.append(Duty("expiry of unverified users", step, expiry.INTERVAL))

    def run(self) -> None:
        """Works until a stop is requested, through outages of either server.

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
                self._rescue.pause()  # workers may not have been able to renew leases either
                self._stop.wait(self._postgres.away(error))

    def _serve(self, connection: Connection, drain: Drain) -> None:
        schema.check_migrated(connection)
        self._installation.identify(connection)
        self._sweep.forget()
        poll_interval = self._settings.poll_interval
        if not self._listen(connection):
            poll_interval = min(poll_interval, UNHEARD_INTERVAL)
        duties = self._duties(drain, poll_interval)
        while not self._stop.is_requested():
            for duty in duties:
                if not self._stop.is_requested() and duty.due <= time.monotonic():
                    self._do(duty, connection)
            self._postgres.back()  # only now: a server may accept the connection and refuse to write
            if self._wait(connection, min(duty.due for duty in duties) - time.monotonic()):
                for duty in duties:
                    if duty.wakes_on_hint:
                        duty.wake()

    def _duties(self, drain: Drain, poll_interval: float) -> list[Duty]:
        """Returns all duties, in the order in which they are done if they are due at the same time."""
        moving = Duty(
            "move of due jobs", self._move_due, SCHEDULE_INTERVAL, needs_redis=True, has_work=lambda work: work.enqueued
        )
        handing = [
            Duty(
                f"hand-over of {queue}",
                partial(hand_over.step, drain=drain),
                poll_interval,
                needs_redis=True,
                has_work=_has_pending(queue),
                wakes_on_hint=True,
                wakes=moving,  # one of the rows may come due before the next look
            )
            for queue, hand_over in self._hand_overs.items()
        ]
        sweeping = Duty(
            "sweep",
            self._sweep.step,
            self._settings.sweep_interval,
            needs_redis=True,
            has_work=lambda work: work.unclaimed,
        )
        looked_for = [*handing, moving, sweeping]
        return [
            Duty("look", partial(self._look, looked_for), RESCUE_INTERVAL),
            *looked_for,
            Duty("repair", self._repair, REPAIR_INTERVAL, needs_redis=True),
            Duty("reconnect", self._reconnect, redis_connection.LIFETIME, needs_redis=True),
            *self._unhurried,
        ]

    def _listen(self, connection: Connection) -> bool:
        """Subscribes to hints and returns whether they can be heard; if not, logs it once."""
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

    def _do(self, duty: Duty, connection: Connection) -> None:
        """Does a step of a duty; if Postgres refuses it, that duty is postponed and the others go on."""
        try:
            if duty.needs_redis:
                self._do_with_redis(duty, connection)
            else:
                duty.end_step(duty.step(connection))
            duty.refusals = 0
        except psycopg.Error as error:
            if postgres.loses_connection(error, connection):
                raise
            self._postpone(duty, error)

    def _postpone(self, duty: Duty, error: psycopg.Error) -> None:
        duty.refusals += 1
        delay = reconnect_delay(duty.refusals)
        duty.due = time.monotonic() + delay
        self._rescue.note_refusal(error)
        if time.monotonic() >= duty.log_due:
            logs.get().warning("duty refused", duty=duty.name, error=one_line(error), next_try=round(delay, 1))
            duty.log_due = time.monotonic() + LOG_INTERVAL

    def _do_with_redis(self, duty: Duty, connection: Connection) -> None:
        if time.monotonic() < self._redis_retry_at:
            duty.due = self._redis_retry_at
            return
        try:
            if not self._redis_checked:
                redis_connection.check_supported(self._client)
                self._repair(connection)
                self._redis_checked = True
            again = duty.step(connection)
        except redis_connection.AWAY as error:
            self._redis_checked = False  # another server may answer next
            redis_connection.drop_connections(self._client)
            duty.due = self._redis_retry_at = time.monotonic() + self._redis.away(error)
        else:
            self._redis.back()
            duty.end_step(again)

    def _wait(self, connection: Connection, seconds: float) -> bool:
        """Waits until a duty is due or a hint arrives; returns whether a hint has arrived.

        It checks for a hint even if a duty is due already: while one queue's batches are full, that is always so, and
        another queue's rows must not wait for the next look.
        """
        if not self._is_hinted and postgres.has_heard(connection, min(max(seconds, 0.0), 1.0)):
            connection.pgconn.consume_input()
            # All of them: each one that is left would wake the relay again.
            while connection.pgconn.notifies():
                self._is_hinted = True
        was_hinted, self._is_hinted = self._is_hinted, False
        return was_hinted

    def _note_hint(self, _: psycopg.Notify) -> None:
        """Notes a hint that came with a statement's answer. Without a handler, psycopg would keep it."""
        self._is_hinted = True

    def _look(self, duties: list[Duty], connection: Connection) -> float:
        """Looks for all work in one statement, and rescues first: every other duty may delay that."""
        began = time.monotonic()
        work = find_work(connection, self._settings)
        self._clock.set(work.now)
        rescue_again = self._rescue.follow(connection, work.now, began, is_expired=work.expired)
        for duty in duties:
            if duty.look_due <= began + LOOK_EARLY:
                duty.look_due = began + duty.interval
                if duty.due == math.inf and duty.has_work and duty.has_work(work):
                    duty.wake()
        next_look = min(began + RESCUE_INTERVAL, *(duty.look_due for duty in duties))
        return min(next_look, began + rescue_again) - time.monotonic()

    def _move_due(self, _: Connection) -> float | None:
        upcoming = self._schedule.move_due(self._clock.now())
        return None if upcoming is None else min(SCHEDULE_INTERVAL, upcoming - self._clock.now())

    def _repair(self, _: Connection) -> None:
        repair(self._client, list(self._settings.queues))
        self._installation.announce()

    def _reconnect(self, _: Connection) -> None:
        redis_connection.drop_connections(self._client)

    def _delete_old_answers(self, connection: Connection) -> float | None:
        return answer_retention.delete_old_answers(connection, self._settings)

    def _warn_about_unserved_queues(self, connection: Connection) -> None:
        unserved_queues.warn_about_unserved_queues(connection, self._settings)


def _has_pending(queue: str) -> Callable[[Work], bool]:
    return lambda work: queue in work.pending
