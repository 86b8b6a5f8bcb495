"""Runs the worker's loop: queues → claim → in flight → handler threads → outcomes → complete."""

import time
from contextlib import suppress
from threading import Thread

import psycopg

from outbox.backoff import retry_delay
from outbox.context import Context
from outbox.queries import query
from outbox.rq_jobs import Delivery
from outbox.runtime import logs, pooler, postgres, redis_connection, schema
from outbox.runtime.log_writer import DRAINING_TIME
from outbox.runtime.outage import Outage
from outbox.runtime.postgres import Connection
from outbox.runtime.settings import WorkerSettings
from outbox.runtime.stop import Stop
from outbox_worker.attempt import attempt
from outbox_worker.claim import Claim
from outbox_worker.claimer import Claimer
from outbox_worker.complete import Completer
from outbox_worker.database import HandlerPool
from outbox_worker.errors import ThreadEndedError
from outbox_worker.held_back import LOOK_INTERVAL, HeldBackQueues
from outbox_worker.in_flight import OVERTIME, InFlight
from outbox_worker.mail import AttemptMails, Mailer
from outbox_worker.outcome import Attempted, Outcome, cut_short
from outbox_worker.overdue import OverdueWatch
from outbox_worker.queues import Queues, Suspended
from outbox_worker.registration import Registration
from outbox_worker.registry import Registry
from outbox_worker.threads import HandlerThreads

COMPLETING_TIME = 5.0
"""Seconds for writing the last outcomes when the worker stops, even if its grace is over."""

CANCELLING_TIME = 1.0
"""Seconds for cancelling the statements of handlers that do not end."""

SIGNING_OFF_TIME = 1.0
"""Seconds for removing the worker from RQ's list; if that takes longer, the entry expires."""

LEAVING_TIME = SIGNING_OFF_TIME + COMPLETING_TIME + CANCELLING_TIME + 2 * DRAINING_TIME + 2
"""Seconds after which a row whose attempt was cut short may be handed over again: by then the last outcomes and log
lines are written, and the process has exited with the handler that did not end."""


class Worker:
    """One worker process.

    A job only names a row; everything else about the row comes from Postgres and goes back there.
    """

    def __init__(self, settings: WorkerSettings, registry: Registry, stop: Stop) -> None:
        self._settings = settings
        self._registry = registry
        self._stop = stop
        self._client = redis_connection.connect(settings.redis_url, "outbox-worker")
        self._registration = Registration(self._client, settings.queues, stop)
        self.name = self._registration.name
        self._queues = Queues(self._client, settings.queues)
        self._redis = Outage("Redis")
        self._postgres = Outage("Postgres")
        self._is_suspended = False
        self._mailer = Mailer(settings)
        self._held_back = HeldBackQueues(settings.queues)
        pooled = settings.transaction_pooling
        self._database = HandlerPool(settings.database_url, size=settings.handler_connections, pooled=pooled)
        self._in_flight = InFlight()
        self._claimer = Claimer(self._in_flight, self.name, settings.lease)
        self._threads = HandlerThreads(settings.concurrency, self._in_flight, self._execute)
        self._overdue = OverdueWatch(self._in_flight, stop)
        self._completer = Completer(
            settings.database_url, self._in_flight, self.name, settings.lease, pooled=pooled, on_failure=stop.request
        )

    def run(self) -> None:
        """Works until a stop is requested, and waits for Postgres and Redis while they are away.

        Raises:
            UnsupportedDatabaseError: the database is not in UTF-8.
            NotMigratedError: the database lacks migrations.
            SettingsError: DATABASE_URL leads to a pooler in transaction mode, and the settings do not say so.
            UnsupportedRedisError: Redis is too old, or not a single server.
            SharedRedisError: another installation uses this Redis.
            OverdueError: a handler does not end.
            NoThreadsError: no thread can be started.
            ThreadEndedError: a handler thread or the completer's thread has ended.
        """
        self._database.open()
        logs.get().info("started", worker=self.name, queues=self._settings.queues, tasks=sorted(self._registry))
        try:
            self._work()
            self._completer.check()
        except ThreadEndedError:
            self._stop.hurry()  # without the completer, no outcome is written and no lease renewed
            raise
        finally:
            self._finish()

    @property
    def has_unended_handlers(self) -> bool:
        """Whether a handler has not ended. After `run` it has outlived the grace, and the process must exit hard."""
        return self._in_flight.has_unended()

    def _work(self) -> None:
        while not self._stop.is_requested():
            self._threads.check()
            try:
                with pooler.connect_checked(
                    self._settings.database_url, "outbox worker claims", pooled=self._settings.transaction_pooling
                ) as connection:
                    schema.check_migrated(connection)
                    self._registration.installation.identify(connection)
                    if not self._settings.transaction_pooling:
                        connection.execute(query("limit_session_lock_wait"))
                    self._completer.start()  # not earlier: it sets limits in its session, which a pooler may share
                    self._postgres.back()
                    self._serve(connection)
            except psycopg.Error as error:
                if not postgres.may_pass(error):
                    raise
                self._claimer.record_lost_answer()
                self._stop.wait(self._postgres.away(error))
        self._claimer.give_back_unanswered()

    def _serve(self, connection: Connection) -> None:
        while not self._stop.is_requested():
            self._threads.check()
            self._wait_for_overdue()
            if not self._claimer.has_jobs:
                self._claimer.add(self._take())
            if self._claimer.has_jobs:
                self._completer.check()  # before the claim: the sweep hands unclaimed rows to another worker
                self._threads.begin(self._claimer.claim(connection))

    def _wait_for_overdue(self) -> None:
        """Waits while a handler is overdue or until a stop is requested, and takes nothing new."""
        while self._overdue.look() and not self._stop.is_requested():
            self._completer.check()
            try:
                self._registration.beat(busy=True)  # the entry must not expire: the other handlers may take hours
            except redis_connection.AWAY as error:
                self._lose_redis(error)
            self._in_flight.wait_until_unended(0, 0.2)

    def _take(self) -> list[Delivery]:
        self._mailer.close_idle()
        if self._in_flight.is_stuck():
            self._in_flight.give_back_waiting()
        self._completer.check()
        # If outcomes cannot be written and leases renewed, another worker would handle these rows again.
        if not self._completer.is_healthy(1):
            return []
        if not (room := min(self._threads.wait_for_room(1), self._claimer.max_jobs)):
            return []
        try:
            self._registration.beat(busy=self._in_flight.count_unended() > 0)
            deliveries = self._take_from_queues(room)
        except Suspended:
            self._redis.back()
            self._log_suspension(is_suspended=True)
            self._stop.wait(1)
            return []
        except redis_connection.AWAY as error:
            self._stop.wait(self._lose_redis(error))
            return []
        self._redis.back()
        self._log_suspension(is_suspended=False)
        return deliveries

    def _lose_redis(self, error: Exception) -> float:
        """Drops the connections to Redis, records the failure, and returns the seconds until the next try."""
        self._registration.forget()
        return self._redis.away(error)

    def _take_from_queues(self, room: int) -> list[Delivery]:
        if not self._mailer.is_away:
            self._held_back.release()
        names, room = self._held_back.takeable(room)
        if not names:
            self._stop.wait(LOOK_INTERVAL / 10)
            return []
        return self._queues.take(room, names) or self._queues.wait(names)

    def _log_suspension(self, *, is_suspended: bool) -> None:
        if is_suspended and not self._is_suspended:
            logs.get().warning(
                "suspended", why="'rq suspend' was run, or another client has set its key: run 'rq resume'"
            )
        elif self._is_suspended and not is_suspended:
            logs.get().info("resumed")
        self._is_suspended = is_suspended

    def _execute(self, claim: Claim) -> Attempted:
        """Runs one attempt, in a handler thread."""
        context = Context(
            row_id=claim.delivery.row_id,
            attempt=claim.attempt,
            deadline=time.monotonic() + claim.timeout,
            database=self._database,
            send=AttemptMails(self._mailer).send,
        )
        attempted = attempt(claim, self._registry, context, self._settings.unhandled_grace)
        if self._mailer.is_away:
            self._held_back.record(claim.queue, is_put_off=attempted.outcome.attempts != claim.attempt)
        return attempted

    def _finish(self) -> None:
        """Waits for handlers, signs off, gives up the rows that did not end, and writes the last outcomes."""
        deadline = (self._stop.requested_at or time.monotonic()) + self._settings.grace
        self._in_flight.give_back_waiting()
        while self.has_unended_handlers and not self._stop.is_hurried() and time.monotonic() < deadline:
            self._in_flight.wait_until_unended(0, 0.2)
        self._sign_off_in_time()
        # As late as possible: the handler of a row that is given up may run until this process exits.
        overdue = {claim.delivery for claim in self._in_flight.overdue()}
        given_up = self._in_flight.give_up(
            lambda claim: _cut_short_outcome(claim, is_overdue=claim.delivery in overdue)
        )
        time_left = COMPLETING_TIME if given_up else max(COMPLETING_TIME, deadline - time.monotonic())
        if lost := self._completer.close(time_left):
            # Their leases pass, and other workers handle them again.
            logs.get().warning("outcomes lost at shutdown", rows=[delivery.row_id for delivery in lost])
        if given_up:  # this process must exit before their delay is over
            self._database.cancel(CANCELLING_TIME)
        else:
            self._database.close(timeout=1)
            self._mailer.close_idle(0)
        logs.get().info("stopped", worker=self.name, cut_short=len(given_up))

    def _sign_off_in_time(self) -> None:
        thread = Thread(target=self._registration.close, daemon=True)
        with suppress(RuntimeError):  # no thread can be started: the entry expires
            thread.start()
            thread.join(SIGNING_OFF_TIME)


def _cut_short_outcome(claim: Claim, *, is_overdue: bool) -> Outcome:
    if is_overdue:
        error = f"the attempt did not end within {OVERTIME:.0f} s past its {claim.timeout} s, and its worker ended"
        return cut_short(claim, error, LEAVING_TIME, retry_delay(claim.attempt))
    return cut_short(claim, "the worker was stopped before the attempt ended", LEAVING_TIME)
