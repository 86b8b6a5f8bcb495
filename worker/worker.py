"""The worker's loop: it takes jobs, claims their rows, runs them, and gives back what it cannot end."""

import time
from contextlib import suppress
from threading import Thread

import psycopg

from outbox import logs, pooler, postgres
from outbox import redis as outbox_redis
from outbox.backoff import retry_delay
from outbox.context import Context
from outbox.jobs import Delivery
from outbox.log_writer import DRAINING_TIME
from outbox.outage import Outage, one_line
from outbox.postgres import Connection
from outbox.queries import query
from outbox.registry import Registry
from outbox.settings import WorkerSettings
from worker.attempt import Attempted, Outcome, attempt, cut_short, given_back, unanswered
from worker.claim import Claim, claim, claim_free
from worker.database import HandlerPool
from worker.errors import OverdueError, ThreadEndedError
from worker.held_back import PAUSE, HeldBack
from worker.leases import Leases
from worker.mail import AttemptMails, Mailer
from worker.mark import Marker
from worker.rq_worker import RQWorker
from worker.slots import OVERTIME, PUTTING_TIME, Slots
from worker.take import Queues, Suspended

MOST_TAKEN = 4096
"""Upper bound of rows taken at a time, where their payloads are small: more than slots have room for by default."""

MOST_CHARACTERS = 64_000_000
"""Characters of payloads that a worker holds at which it claims nothing of what it has put off."""

MARKING_TIME = 5.0
"""Seconds that the last marks may take when the worker stops, even if its grace is over."""

CANCELLING_TIME = 1.0
"""Seconds that it may take to cancel the statements of handlers that do not end."""

SIGNING_OFF_TIME = 1.0
"""Seconds that Redis may take to hear that the worker is gone; if it does not, the registration runs out by itself."""

LEAVING_TIME = PUTTING_TIME + MARKING_TIME + CANCELLING_TIME + 2 * DRAINING_TIME + 2
"""Seconds after which a row whose attempt was cut short may be handed over again: by then the last outcomes and log
lines are written, and this process has exited, and with it the handler that did not end."""


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
        self._may_have_claimed = False
        """Whether a claim of what was taken got no answer."""
        self._put_off: list[Delivery] = []
        """What the last claim has left for another, because payloads are large."""
        self._most_taken = MOST_TAKEN
        """As many rows as one claim may read: so many more are claimed ahead of the handlers as well."""
        self._mailer = Mailer(settings)
        self._held_back = HeldBack(settings.queues)
        self._postgres = Outage("Postgres")
        self._leases = Leases(settings.lease, self.name)
        self._marker = Marker(
            settings.database_url, self._leases, pooled=settings.transaction_pooling, on_end=self.stopping.set
        )
        self._database = HandlerPool(
            settings.database_url, size=settings.handler_connections, pooled=settings.transaction_pooling
        )
        self._slots = Slots(settings.concurrency, self._handle, self._marker.put)

    def run(self) -> None:
        """Works until it is told to stop, through outages of either server.

        Raises:
            UnsupportedDatabaseError: the database is not in UTF-8.
            NotMigratedError: it lacks migrations.
            SettingsError: a pooler in transaction mode stands before Postgres, and the settings do not say so.
            UnsupportedRedisError: Redis is one that cannot serve.
            SharedRedisError: another installation uses it.
            OverdueError: a handler does not end any more.
            NoThreadsError, ThreadEndedError: it has no threads to work with.
        """
        self._install_signal_handlers()
        self._database.open()
        logs.get().info("started", worker=self.name, queues=self._settings.queues, tasks=sorted(self._registry))
        try:
            self._work()
            self._marker.check()
        except ThreadEndedError:
            self.hurry.set()  # what ends now could not be marked, and no lease is renewed
            raise
        finally:
            self._finish()

    @property
    def has_unfinished(self) -> bool:
        """Whether a handler outlived the worker's grace: its row was given back, and the process should exit hard."""
        return bool(self._slots.unfinished)

    def _work(self) -> None:
        taken: list[Delivery] = []
        while not self.stopping.is_set():
            self._slots.check()
            try:
                with pooler.connect_checked(
                    self._settings.database_url, "outbox worker claims", pooled=self._settings.transaction_pooling
                ) as connection:
                    postgres.check_migrated(connection)
                    self.installation.identify(connection)
                    if not self._settings.transaction_pooling:
                        connection.execute(query("limit_lock_wait"))
                    self._marker.start()  # not before: it leaves limits in its session
                    self._postgres.back()
                    self._serve(connection, taken)
            except psycopg.Error as error:
                if not postgres.may_pass(error):
                    raise
                self._may_have_claimed = bool(taken)
                self.stopping.wait(self._postgres.away(error))
        if self._may_have_claimed:
            self._give_back_unanswered(taken)

    def _serve(self, connection: Connection, taken: list[Delivery]) -> None:
        while not self.stopping.is_set():
            self._slots.check()
            self._wait_for_overdue()
            if not taken:
                taken += dict.fromkeys(self._take())  # Redis may have a job twice
            if taken:
                self._marker.check()  # else the sweep offers them to another worker
                # What an earlier claim may have claimed is claimed again one by one: a lock that one of them meets must
                # not keep the others waiting, which may be running in this worker's name already.
                batch = taken[:1] if self._may_have_claimed else taken.copy()
                claims = self._claim(connection, batch)
                self._most_taken = max(1, len(claims)) if self._put_off else min(MOST_TAKEN, 2 * self._most_taken)
                del taken[: len(batch)]
                self._leases.hold(claims)
                for claimed in self._slots.begin(claims):
                    self._marker.put(given_back(claimed))
                if self._may_have_claimed and not claims:
                    self._give_back_unanswered(batch)
                self._may_have_claimed = self._may_have_claimed and bool(taken)
                if self._put_off:
                    taken += self._claimable()

    def _give_back_unanswered(self, taken: list[Delivery]) -> None:
        """Gives back what this worker may have claimed, and does not begin; nothing changes where it has not."""
        held = self._leases.held()
        for delivery in taken:
            if delivery not in held:  # else it runs, and this is a copy of its job
                self._marker.put(unanswered(delivery))

    def _claimable(self) -> list[Delivery]:
        """Returns what was put off, unless too much waits for handlers already; then the sweep hands it over again."""
        if sum(len(claimed.payload) for claimed in self._slots.unfinished) < MOST_CHARACTERS:
            return self._put_off
        why = f"the payloads of rows that were claimed have over {MOST_CHARACTERS:,} characters"
        logs.get().warning("claim refused", error=why, jobs=len(self._put_off))
        return []

    def _claim(self, connection: Connection, taken: list[Delivery]) -> list[Claim]:
        """Claims what was taken; where that is refused, those that can be claimed without waiting and by themselves.

        What somebody else has locked is left to the sweep, which hands it over again once it is free.
        """
        given = (self.name, self._settings.lease, self._leases.held())
        self._put_off = []
        try:
            return claim(connection, taken, *given, put_off=self._put_off)
        except psycopg.Error as error:
            _raise_outage(connection, error)
            refusal = error
        claims: list[Claim] = []
        refused: list[tuple[Delivery, Exception]] = []
        try:
            claims, refused = claim_free(connection, taken, *given)
        except psycopg.Error as error:
            _raise_outage(connection, error)
        if left := len(taken) - len(claims) - len(refused):
            is_lock = isinstance(refusal, psycopg.errors.LockNotAvailable)
            event = "claim timed out waiting for a row lock" if is_lock else "claim refused"
            logs.get().warning(event, error=one_line(refusal), jobs=left)
        if refused:
            rows, why = sorted(delivery.row for delivery, _ in refused), refused[0][1]
            logs.get().error("rows cannot be claimed", rows=rows, error=one_line(why))
        return claims

    def _wait_for_overdue(self) -> None:
        """Takes nothing new while a handler is overdue, and lets the others end.

        A thread cannot be ended, so only the end of the process makes sure that no attempt of the row begins while this
        one runs.

        Raises:
            OverdueError: only overdue handlers are left, and none has ended within a second.
        """
        seen_at: dict[Delivery, float] = {}
        logged: set[Delivery] = set()
        while overdue := self._slots.overdue():
            now = time.monotonic()
            seen_at = {claimed.delivery: seen_at.get(claimed.delivery, now) for claimed in overdue}
            # At the first look this process may just have been paused, and the handler be about to end.
            confirmed = [claimed for claimed in overdue if now - seen_at[claimed.delivery] > 1]
            for claimed in confirmed:
                if claimed.delivery not in logged:
                    self._log_overdue(claimed)
            logged.update(claimed.delivery for claimed in confirmed)
            self._give_back_waiting()
            if confirmed and {claimed.delivery for claimed in self._slots.unfinished} <= logged & seen_at.keys():
                self.hurry.set()  # there is nothing to wait for
                rows = ", ".join(str(claimed.delivery.row) for claimed in confirmed)
                raise OverdueError(f"the handlers of rows {rows} do not end: start another worker")
            if self.stopping.is_set():
                return
            self._marker.check()
            self._beat_while_overdue()
            self._slots.wait_until_empty(0.2)

    def _beat_while_overdue(self) -> None:
        """Keeps the worker on RQ's list: the other handlers may take hours."""
        try:
            self.beat(busy=True)
        except outbox_redis.AWAY as error:
            self.forget()
            self._redis.away(error)

    @staticmethod
    def _log_overdue(claimed: Claim) -> None:
        row, delivery = claimed.delivery
        logs.get().error(
            "attempt is overdue",
            type=claimed.task,
            row=row,
            delivery=delivery,
            attempt=claimed.attempt,
            timeout=claimed.timeout,
            request_id=claimed.request_id,
        )

    def _take(self) -> list[Delivery]:
        self._mailer.close_idle()
        if self._slots.are_stuck:
            self._give_back_waiting()
        self._marker.check()
        # Without marks and renewed leases, what is done here would be done again elsewhere.
        if not self._marker.is_healthy(1):
            return []
        if not (room := min(self._slots.wait_for_room(1), self._most_taken)):
            return []
        try:
            self.beat(busy=self.has_unfinished)
            deliveries = self._take_from_queues(room)
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

    def _take_from_queues(self, room: int) -> list[Delivery]:
        if not self._mailer.is_away:
            self._held_back.release()
        names, room = self._held_back.takeable(room)
        if not names:
            self.stopping.wait(PAUSE / 10)
            return []
        return self._queues.take(room, names) or self._queues.wait(names)

    def _tell_of_suspension(self, *, is_suspended: bool) -> None:
        if is_suspended and not self._is_suspended:
            logs.get().warning("suspended", why="'rq suspend' was given, or somebody has set its key; see 'rq resume'")
        elif self._is_suspended and not is_suspended:
            logs.get().info("resumed")
        self._is_suspended = is_suspended

    def _handle(self, claimed: Claim) -> Attempted:
        context = Context(
            row=claimed.delivery.row,
            attempt=claimed.attempt,
            deadline=time.monotonic() + claimed.timeout,
            database=self._database,
            send=AttemptMails(self._mailer).send,
            settings=self._settings,
        )
        attempted = attempt(claimed, self._registry, context)
        if self._mailer.is_away:
            self._held_back.note(claimed.queue, is_put_off=attempted.outcome.attempts != claimed.attempt)
        return attempted

    def _sign_off_in_time(self) -> None:
        signing_off = Thread(target=self.sign_off, daemon=True)
        with suppress(RuntimeError):  # no thread can be started: the registration runs out by itself
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
        overdue = {claimed.delivery for claimed in self._slots.overdue()}
        unfinished = self._slots.give_up(lambda claimed: _cut_short(claimed, is_overdue=claimed.delivery in overdue))
        last_marks = MARKING_TIME if unfinished else max(MARKING_TIME, deadline - time.monotonic())
        if unmarked := self._marker.close(last_marks):
            # Their leases run out, and they are done again.
            logs.get().warning("outcomes lost at shutdown", rows=[delivery.row for delivery in unmarked])
        if unfinished:  # there is an exit to hurry to
            self._database.cancel(CANCELLING_TIME)
        else:
            self._database.close(timeout=1)
            self._mailer.close_idle(0)
        logs.get().info("stopped", worker=self.name, cut_short=len(unfinished))


def _raise_outage(connection: Connection, error: psycopg.Error) -> None:
    if postgres.is_outage(error) or connection.closed:
        raise error


def _cut_short(claimed: Claim, *, is_overdue: bool) -> Outcome:
    if is_overdue:
        error = f"the attempt did not end within {OVERTIME:.0f} s past its {claimed.timeout} s, and its worker ended"
        return cut_short(claimed, error, LEAVING_TIME, retry_delay(claimed.attempt))
    return cut_short(claimed, "the worker was stopped before the attempt ended", LEAVING_TIME)
