"""The worker: a real RQ worker to the outside, with a loop that takes, claims and runs rows."""

import json
import os
import signal
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Condition, Event, Thread
from types import FrameType
from typing import Any

import psycopg
from psycopg_pool import ConnectionPool
from redis.client import PubSub, PubSubWorkerThread
from rq import worker_registration
from rq.utils import now as rq_now
from rq.worker import BaseWorker, WorkerStatus

from outbox import logs, postgres
from outbox import redis as outbox_redis
from outbox.context import Context
from outbox.jobs import Delivery, OutboxJob
from outbox.outage import Outage, one_line
from outbox.settings import WorkerSettings
from outbox.task import Registry
from worker.attempt import Outcome, attempt
from worker.claim import Claim, claim
from worker.mail import Mailer
from worker.mark import Marker
from worker.take import Queues, Suspended

HEARTBEAT_INTERVAL = 15.0
"""Seconds between two registrations in Redis."""

HANDLER_CONNECTIONS = 4
"""How many connections to Postgres all handlers of a worker share."""

MARKING_TIME = 5.0
"""Seconds that the last marks may take when the worker stops."""


class OutboxWorker(BaseWorker):
    """One worker process.

    `rq info` lists it with its queues, `rq suspend` pauses it, RQ's shutdown command and signals stop it. Its jobs
    say which row they mean; everything else about a row comes from Postgres and goes back there. RQ's own
    bookkeeping (registries, executions, results, retries) would be a second truth, so none of it is used.
    """

    job_class = OutboxJob

    def __init__(self, settings: WorkerSettings, registry: Registry) -> None:
        self._client = outbox_redis.connect(settings.redis_url, "outbox-worker")
        super().__init__(list(settings.queues), connection=self._client, prepare_for_work=False)
        self.hostname, self.pid = socket.gethostname(), os.getpid()
        self._settings = settings
        self._registry = registry
        self._queues = Queues(self._client, settings.queues)
        self._redis = Outage("Redis")
        self._redis_checked = False
        self._beat_at = 0.0
        self._commands: PubSubWorkerThread | None = None
        self._stopping = Event()
        self._hurry = Event()
        self._stop_requested_at = 0.0
        self._running: dict[Delivery, Claim] = {}
        self._changed = Condition()
        self._handlers = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="handler")
        self._mailer = Mailer(settings)
        self._postgres = Outage("Postgres")
        self._marker = Marker(settings.database_url, settings.lease)
        self._database: ConnectionPool[Any] = ConnectionPool(
            settings.database_url,
            kwargs={"autocommit": True, "application_name": "outbox worker handlers", **postgres.LIMITS},
            min_size=0,
            max_size=HANDLER_CONNECTIONS,
            check=ConnectionPool.check_connection,  # an outage must not cost the next handlers an attempt each
            open=False,
        )

    def run(self) -> bool:
        """Works until it is told to stop, through outages of either server.

        Returns:
            Whether every handler has ended; if not, its row was given back and the process should exit hard.

        Raises:
            NotMigratedError: the database lacks migrations.
            UnsupportedRedisError: Redis is one that cannot serve.
        """
        self._install_signal_handlers()
        self._database.open()
        self._marker.start()
        logs.get().info("started", worker=self.name, queues=self._settings.queues, tasks=sorted(self._registry))
        taken: list[Delivery] = []
        while not self._stopping.is_set():
            try:
                with postgres.connect(self._settings.database_url, "outbox worker claims") as connection:
                    postgres.check_migrated(connection)
                    self._postgres.back()
                    self._serve(connection, taken)
            except postgres.AWAY as error:
                self._stopping.wait(self._postgres.away(error))
        return self._finish()

    def _serve(self, connection: psycopg.Connection[dict[str, Any]], taken: list[Delivery]) -> None:
        while not self._stopping.is_set():
            if not taken:
                taken += self._take()
            if taken:
                claims = claim(connection, taken, self.name, self._settings.lease)
                taken.clear()
                self._start(claims)

    def _take(self) -> list[Delivery]:
        free = self._wait_for_slots()
        if not free:
            return []
        try:
            self._beat()
            deliveries = self._queues.take(free) or self._queues.wait()
        except Suspended:
            self._redis.back()
            self._stopping.wait(1)
            return []
        except outbox_redis.AWAY as error:
            self._redis_checked = False  # it may come back as another
            self._beat_at = 0.0
            self._stopping.wait(self._redis.away(error))
            return []
        self._redis.back()
        return deliveries

    def _wait_for_slots(self) -> int:
        with self._changed:
            self._changed.wait_for(lambda: len(self._running) < self._settings.concurrency, timeout=1)
            return self._settings.concurrency - len(self._running)

    def _start(self, claims: list[Claim]) -> None:
        self._marker.hold(claims)
        with self._changed:
            self._running.update({claimed.delivery: claimed for claimed in claims})
        for claimed in claims:
            self._handlers.submit(self._run_handler, claimed)

    def _run_handler(self, claimed: Claim) -> None:
        context = Context(
            row=claimed.delivery.row,
            attempt=claimed.attempt,
            database=self._database,
            send=self._mailer.send,
            settings=self._settings,
        )
        outcome = attempt(claimed, self._registry, context)
        with self._changed:  # together, or the row might be given back after its outcome
            self._marker.put(outcome)
            self._running.pop(claimed.delivery, None)
            self._changed.notify_all()

    def _finish(self) -> bool:
        """Lets handlers end, gives back what does not, writes the last marks, and signs off."""
        deadline = time.monotonic() + self._settings.grace
        with self._changed:
            while self._running and not self._hurry.is_set() and time.monotonic() < deadline:
                self._changed.wait(0.2)
            unfinished = list(self._running.values())
            for claimed in unfinished:
                self._marker.put(
                    Outcome(
                        claimed.delivery, "pending", claimed.attempt - 1, error="given back: the worker was stopped"
                    )
                )
        marked = self._marker.close(MARKING_TIME)
        self._sign_off()
        self._handlers.shutdown(wait=False, cancel_futures=True)
        self._database.close(timeout=1)
        logs.get().info("stopped", worker=self.name, given_back=len(unfinished), all_marked=marked)
        return not unfinished

    # What makes it an RQ worker to the outside.

    def _install_signal_handlers(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.request_stop)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler's arguments
        """Takes nothing new and lets handlers end; asked again a second later or more, gives them up at once."""
        # In a thread: the signal may have struck inside an event's own lock.
        Thread(target=self._stop_or_hurry, args=(time.monotonic(),)).start()

    def _stop_or_hurry(self, now: float) -> None:
        if self._stopping.is_set() and now - self._stop_requested_at > 1:
            self._hurry.set()  # one Ctrl-C may arrive twice, from the terminal and from whoever started us
        if not self._stopping.is_set():
            self._stop_requested_at = now
        self._stopping.set()

    def _beat(self) -> None:
        if time.monotonic() < self._beat_at:
            return
        if not self._redis_checked:
            outbox_redis.check_supported(self._client)
            self._redis_checked = True
        self.last_heartbeat = rq_now()
        if self.birth_date is None:
            self.birth_date = self.last_heartbeat
        with self._client.pipeline() as pipeline:
            # The whole registration every time: Redis may have been emptied since the last.
            pipeline.delete(self.key)  # whatever a stranger made of it
            worker_registration.register(self, pipeline)
            pipeline.hset(self.key, mapping=self.serialize())
            self.set_state(WorkerStatus.BUSY if self._running else WorkerStatus.IDLE, pipeline)
            pipeline.expire(self.key, self.worker_ttl)
            for failure in pipeline.execute(raise_on_error=False):
                if isinstance(failure, Exception):  # a stranger's key: the relay mends it, and work goes on unlisted
                    logs.get().warning("registered in part", error=one_line(failure))
        if self._commands is None or not self._commands.is_alive():
            self.subscribe()
        self._beat_at = time.monotonic() + HEARTBEAT_INTERVAL

    def subscribe(self) -> None:
        """Listens for RQ's commands to this worker."""
        self.pubsub = self._client.pubsub()
        self.pubsub.subscribe(**{self.pubsub_channel_name: self.handle_payload})
        self._commands = self.pubsub.run_in_thread(
            sleep_time=1.0, daemon=True, exception_handler=self._pubsub_exception_handler
        )

    def handle_payload(self, message: Mapping[str, Any]) -> None:
        """Obeys RQ's shutdown command. The others speak of forks that this worker does not have."""
        try:
            command = json.loads(message["data"])["command"]
        except (ValueError, TypeError, LookupError, RecursionError):
            command = None
        if command == "shutdown":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            logs.get().warning("ignored an RQ command", command=repr(message["data"][:100]))

    def _pubsub_exception_handler(self, exc: Exception, _: PubSub, pubsub_thread: PubSubWorkerThread) -> None:
        logs.get().debug("RQ commands cannot be heard", error=one_line(exc))
        pubsub_thread.stop()  # the next heartbeat that reaches Redis subscribes again

    def _sign_off(self) -> None:
        if self._commands is not None:
            self._commands.stop()
        with suppress(*outbox_redis.AWAY):  # if Redis is away, the registration runs out by itself
            self.register_death()  # type: ignore[no-untyped-call]
        self._client.close()
