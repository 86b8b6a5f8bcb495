"""The worker's loop: it takes jobs, claims their rows, runs them, and gives back what it cannot end."""

import time

from outbox import logs, pooler, postgres
from outbox import redis as outbox_redis
from outbox.context import Context
from outbox.jobs import Delivery
from outbox.outage import Outage
from outbox.postgres import Connection
from outbox.registry import Registry
from outbox.settings import WorkerSettings
from worker.attempt import Outcome, attempt, given_back
from worker.claim import Claim, claim
from worker.database import HandlerPool
from worker.mail import Mailer
from worker.mark import Marker
from worker.rq_worker import RQWorker
from worker.slots import Slots
from worker.take import Queues, Suspended

MARKING_TIME = 5.0
"""Seconds that the last marks may take when the worker stops, even if its grace is over."""

LEAVING_TIME = MARKING_TIME + 1
"""Seconds after which a row that was given back may be handed over again: by then this process has exited, and with
it the handler that did not end."""


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
        self._mailer = Mailer(settings)
        self._postgres = Outage("Postgres")
        self._marker = Marker(settings.database_url, settings.lease, pooled=settings.transaction_pooling)
        self._database = HandlerPool(settings.database_url, pooled=settings.transaction_pooling)
        self._slots = Slots(settings.concurrency, self._handle, self._marker.put)

    def run(self) -> None:
        """Works until it is told to stop, through outages of either server.

        Raises:
            NotMigratedError: the database lacks migrations.
            SettingsError: a pooler in transaction mode stands before Postgres, and the settings do not say so.
            UnsupportedRedisError: Redis is one that cannot serve.
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
                claims = claim(connection, taken, self.name, self._settings.lease)
                taken.clear()
                self._marker.hold(claims)
                for claimed in self._slots.begin(claims):
                    self._marker.put(given_back(claimed))

    def _take(self) -> list[Delivery]:
        if self._slots.are_stuck:
            self._give_back_waiting()
        # Without marks and renewed leases, what is done here would be done again elsewhere.
        if not self._marker.healthy.wait(1) or not (room := self._slots.wait_for_room(1)):
            return []
        try:
            self.beat(busy=self.has_unfinished)
            deliveries = self._queues.take(room) or self._queues.wait()
        except Suspended:
            self._redis.back()
            self.stopping.wait(1)
            return []
        except outbox_redis.AWAY as error:
            self.forget()
            self.stopping.wait(self._redis.away(error))
            return []
        self._redis.back()
        return deliveries

    def _handle(self, claimed: Claim) -> Outcome:
        context = Context(
            row=claimed.delivery.row,
            attempt=claimed.attempt,
            database=self._database,
            send=self._mailer.send,
            settings=self._settings,
        )
        return attempt(claimed, self._registry, context)

    def _give_back_waiting(self) -> None:
        for claimed in self._slots.take_back():
            self._marker.put(given_back(claimed))

    def _finish(self) -> None:
        """Lets handlers end, signs off, gives back what did not end, and writes the last marks."""
        deadline = (self._stop_requested_at or time.monotonic()) + self._settings.grace
        self._give_back_waiting()
        while self.has_unfinished and not self.hurry.is_set() and time.monotonic() < deadline:
            self._slots.wait_until_empty(0.2)
        self.sign_off()
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
