"""The worker's loop: it takes jobs, claims their rows, runs them, and gives back what it cannot end."""

import time
from threading import Thread

import psycopg

from outbox import logs, pooler, postgres
from outbox import redis as outbox_redis
from outbox.context import Context
from outbox.errors import OutboxError
from outbox.jobs import Delivery
from outbox.outage import Outage, one_line
from outbox.postgres import Connection
from outbox.queries import query
from outbox.registry import Registry
from outbox.settings import WorkerSettings
from worker.attempt import Outcome, attempt, given_back
from worker.claim import Claim, claim
from worker.database import HandlerPool
from worker.leases import OVERTIME, Leases
from worker.mail import Mailer
from worker.mark import Marker
from worker.rq_worker import RQWorker
from worker.slots import Slots
from worker.take import Queues, Suspended

MARKING_TIME = 5.0
"""Seconds that the last marks may take when the worker stops, even if its grace is over."""

SIGNING_OFF_TIME = 1.0
"""Seconds that Redis may take to hear that the worker is gone; if it does not, the registration runs out by itself."""

LEAVING_TIME = MARKING_TIME + 1
"""Seconds after which a row that was given back may be handed over again: by then this process has exited, and with
it the handler that did not end."""


class StuckError(OutboxError):
    """Every handler blocks in the system, long past its time limit; their rows are other workers' by now."""


class OutboxWorker(RQWorker):
    """One worker process.

    A job says which row it means; everything else about the row comes from Postgres and goes back there.
    """

    def __init__(self, settings: WorkerSettings, registry: Registry) -> None:
        client = outbox_redis.connect(settings.redis_url, "outbox-worker")
        super().__init__(client, settings.queues)
        self._settings = settings
        self._registry = registry
        self._queues = Queues(client, settings.queues)
        self._redis = Outage("Redis")
        self._is_suspended = False
        self._mailer = Mailer(settings)
        self._postgres = Outage("Postgres")
        # The time limit strikes an attempt after a step with the mail server or with Postgres, not within.
        overtime = OVERTIME + max(settings.smtp_timeout, postgres.ANSWER_LIMIT)
        self._leases = Leases(settings.lease, overtime)
        self._marker = Marker(settings.database_url, self._leases, pooled=settings.transaction_pooling)
        self._database = HandlerPool(settings.database_url, pooled=settings.transaction_pooling)
        self._slots = Slots(settings.concurrency, self._handle, self._marker.put)

    def run(self) -> None:
        """Works until it is told to stop, through outages of either server.

        Raises:
            UnsupportedDatabaseError: the database is not in UTF-8.
            NotMigratedError: it lacks migrations.
            SettingsError: a pooler in transaction mode stands before Postgres, and the settings do not say so.
            UnsupportedRedisError: Redis is one that cannot serve.
            StuckError: no handler ends any more.
        """
        self._install_signal_handlers()
        self._database.open()
        logs.get().info("started", worker=self.name, queues=self._settings.queues, tasks=sorted(self._registry))
        try:
            self._work()
        finally:
            self._finish()

    @property
    def has_unfinished(self) -> bool:
        """Whether a handler outlived the worker's grace: its row was given back, and the process should exit hard."""
        return bool(self._slots.unfinished)

    def _work(self) -> None:
        taken: list[Delivery] = []
        while not self.stopping.is_set():
            try:
                with pooler.connect_checked(
                    self._settings.database_url, "outbox worker claims", pooled=self._settings.transaction_pooling
                ) as connection:
                    postgres.check_migrated(connection)
                    if not self._settings.transaction_pooling:
                        connection.execute(query("limit_lock_wait"))
                    self._marker.start()  # not before: it leaves limits in its session
                    self._postgres.back()
                    self._serve(connection, taken)
            except postgres.AWAY as error:
                self.stopping.wait(self._postgres.away(error))

    def _serve(self, connection: Connection, taken: list[Delivery]) -> None:
        while not self.stopping.is_set():
            if not taken:
                taken += self._take()
            if taken:
                claims = self._claim(connection, taken)
                taken.clear()
                self._leases.hold(claims)
                for claimed in self._slots.begin(claims):
                    self._marker.put(given_back(claimed))

    def _claim(self, connection: Connection, taken: list[Delivery]) -> list[Claim]:
        try:
            return claim(connection, taken, self.name, self._settings.lease)
        except psycopg.errors.LockNotAvailable as error:
            # The sweep hands them over again, but for those that are still locked: nobody need wait for these.
            logs.get().warning("claims given up for a lock", error=one_line(error), jobs=len(taken))
            return []

    def _take(self) -> list[Delivery]:
        if self._slots.are_stuck:
            self._give_back_waiting()
        # Without marks and renewed leases, what is done here would be done again elsewhere.
        if not self._marker.is_healthy(1):
            return []
        if not (room := self._slots.wait_for_room(1)):
            self._check_that_a_handler_may_end()
            return []
        try:
            self.beat(busy=self.has_unfinished)
            deliveries = self._queues.take(room) or self._queues.wait()
        except Suspended:
            self._redis.back()
            self._tell_of_suspension(is_suspended=True)
            self.stopping.wait(1)
            return []
        except outbox_redis.AWAY as error:
            self.forget()
            self.stopping.wait(self._redis.away(error))
            return []
        self._redis.back()
        self._tell_of_suspension(is_suspended=False)
        return deliveries

    def _check_that_a_handler_may_end(self) -> None:
        if self._leases.overrun(self._slots.undecided) >= self._settings.concurrency:
            self.hurry.set()  # there is nothing to wait for
            raise StuckError(
                f"all {self._settings.concurrency} handlers hang where no time limit reaches them: start another worker"
            )

    def _tell_of_suspension(self, *, is_suspended: bool) -> None:
        if is_suspended and not self._is_suspended:
            logs.get().warning("suspended", why="'rq suspend' was given, or somebody has set its key; see 'rq resume'")
        elif self._is_suspended and not is_suspended:
            logs.get().info("resumed")
        self._is_suspended = is_suspended

    def _handle(self, claimed: Claim) -> Outcome:
        context = Context(
            row=claimed.delivery.row,
            attempt=claimed.attempt,
            database=self._database,
            send=self._mailer.send,
            settings=self._settings,
        )
        return attempt(claimed, self._registry, context)

    def _sign_off_in_time(self) -> None:
        signing_off = Thread(target=self.sign_off, daemon=True)
        signing_off.start()
        signing_off.join(SIGNING_OFF_TIME)

    def _give_back_waiting(self) -> None:
        for claimed in self._slots.take_back():
            self._marker.put(given_back(claimed))

    def _finish(self) -> None:
        """Lets handlers end, signs off, gives back what did not end, and writes the last marks."""
        deadline = (self._stop_requested_at or time.monotonic()) + self._settings.grace
        self._give_back_waiting()
        while self.has_unfinished and not self.hurry.is_set() and time.monotonic() < deadline:
            self._slots.wait_until_empty(0.2)
        self._sign_off_in_time()
        # Last, so that a handler that is given up has no time left to end all the same while its row is another's.
        unfinished = self._slots.give_up(
            lambda claimed: Outcome(
                claimed.delivery,
                "pending",
                claimed.attempt - 1,
                LEAVING_TIME,
                "given back: the worker was stopped",
            )
        )
        last_marks = MARKING_TIME if unfinished else max(MARKING_TIME, deadline - time.monotonic())
        if unmarked := self._marker.close(last_marks):
            # Their leases run out, and they are done again.
            logs.get().warning("marks are lost", rows=[delivery.row for delivery in unmarked])
        if not unfinished:  # else there is an exit to hurry to
            self._database.close(timeout=1)
        logs.get().info("stopped", worker=self.name, given_back=len(unfinished))
