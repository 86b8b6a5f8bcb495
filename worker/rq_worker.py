"""What makes our worker an RQ worker to the outside: its registration, RQ's commands, signals."""

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from threading import Event
from typing import Any

import redis
from redis.client import PubSub, PubSubWorkerThread
from rq import worker_registration
from rq.utils import now as rq_now
from rq.worker import BaseWorker, WorkerStatus

from outbox import logs, start
from outbox import redis as outbox_redis
from outbox.installation import Installation
from outbox.jobs import OutboxJob
from outbox.outage import one_line

HEARTBEAT_INTERVAL = 15.0
"""Seconds between two registrations in Redis."""
LONGEST_COMMAND = 1000
"""Bytes: more than a command of RQ's has. Read as JSON, a longer message would take many times its size."""


class RQWorker(BaseWorker):
    """`rq info` lists it with its queues, `rq suspend` pauses it, RQ's shutdown command and signals stop it.

    RQ's own bookkeeping of jobs (registries, executions, results, retries) would be a second truth beside the rows,
    so none of it is used.
    """

    job_class = OutboxJob

    def __init__(self, client: redis.Redis, queues: Iterable[str]) -> None:
        super().__init__(list(queues), connection=client, prepare_for_work=False)
        self.hostname, self.pid = socket.gethostname(), os.getpid()
        self.stopping = Event()
        """Take nothing new, and let handlers end."""
        self.hurry = Event()
        """Give up what has not ended."""
        self._stop_requested_at = 0.0
        self._signalled_at = 0.0
        """By the first signal to stop; a command of RQ's is none."""
        self._client = client
        self.installation = Installation(client)
        self._commands: PubSubWorkerThread | None = None
        self._beat_at = 0.0
        self._connected_at = 0.0

    def _set_connection(self, connection: redis.Redis) -> redis.Redis:
        """Leaves the client its own time limits: RQ would make a Redis that hangs go unnoticed for seven minutes."""
        return connection

    def _install_signal_handlers(self) -> None:
        start.on_stop_signal(self._stop_or_hurry)

    def _stop_or_hurry(self) -> None:
        """Takes nothing new and lets handlers end; asked again a second later or more, gives them up at once."""
        now = time.monotonic()
        self._signalled_at = self._signalled_at or now
        if now - self._signalled_at > 1:
            self.hurry.set()  # one Ctrl-C may arrive twice, from the terminal and from the process that started us
        self._stop()

    def _stop(self) -> None:
        if not self.stopping.is_set():
            self._stop_requested_at = time.monotonic()
        self.stopping.set()

    def beat(self, *, busy: bool) -> None:
        """Registers the worker, or renews that, every `HEARTBEAT_INTERVAL` and at the first call after `forget`.

        Raises:
            UnsupportedRedisError: Redis is one that cannot serve.
            SharedRedisError: another installation uses it.
            redis.RedisError: Redis is away.
        """
        now = time.monotonic()
        if now - self._connected_at > outbox_redis.LIFETIME:
            self.forget()
        if now < self._beat_at:
            return
        if self._beat_at == 0.0:
            outbox_redis.check_supported(self._client)  # it may have come back as another
            self._connected_at = now
        self.installation.announce()
        self.last_heartbeat = rq_now()
        if self.birth_date is None:
            self.birth_date = self.last_heartbeat
        with self._client.pipeline() as pipeline:
            # The whole registration every time: Redis may have been emptied since the last.
            pipeline.delete(self.key)  # in case the key was overwritten by another client
            worker_registration.register(self, pipeline)
            pipeline.hset(self.key, mapping=self.serialize())
            self.set_state(WorkerStatus.BUSY if busy else WorkerStatus.IDLE, pipeline)
            pipeline.expire(self.key, self.worker_ttl)
            for failure in pipeline.execute(raise_on_error=False):
                if isinstance(failure, Exception):  # a stranger's key: the relay mends it, and work goes on unlisted
                    logs.get().warning("registered in part", error=one_line(failure))
        if self._commands is None or not self._commands.is_alive():
            try:
                self.subscribe()
            except RuntimeError as error:  # no thread can be started: signals are heard all the same
                logs.get().warning("RQ commands cannot be heard", error=one_line(error))
        self._beat_at = time.monotonic() + HEARTBEAT_INTERVAL

    def forget(self) -> None:
        """Drops all connections, and makes the next beat a registration: Redis was away, or may be another by now."""
        outbox_redis.drop_connections(self._client)
        if self._commands is not None:
            self._commands.stop()  # it closes its own connection within a second
            self._commands = None
        self._beat_at = 0.0

    def subscribe(self) -> None:
        """Listens for RQ's commands to this worker."""
        self.pubsub = self._client.pubsub()
        self.pubsub.subscribe(**{self.pubsub_channel_name: self.handle_payload})
        self._commands = self.pubsub.run_in_thread(
            sleep_time=1.0, daemon=True, exception_handler=self._pubsub_exception_handler
        )

    def handle_payload(self, message: Mapping[str, Any]) -> None:
        """Obeys RQ's shutdown command, however often it comes: whoever can write to Redis must not end handlers.

        The other commands speak of forks that this worker does not have.
        """
        try:
            command = json.loads(message["data"])["command"] if len(message["data"]) <= LONGEST_COMMAND else None
        except (ValueError, TypeError, LookupError, RecursionError):
            command = None
        if command == "shutdown":
            self._stop()
        else:
            logs.get().warning("ignored an RQ command", command=repr(message["data"][:100]))

    def _pubsub_exception_handler(self, exc: Exception, _: PubSub, pubsub_thread: PubSubWorkerThread) -> None:
        logs.get().debug("RQ commands cannot be heard", error=one_line(exc))
        pubsub_thread.stop()  # the next heartbeat that reaches Redis subscribes again

    def sign_off(self) -> None:
        """Takes the worker off RQ's list and closes the connection."""
        if self._commands is not None:
            self._commands.stop()
        with suppress(*outbox_redis.AWAY):  # if Redis is away, the registration runs out by itself
            self.register_death()  # type: ignore[no-untyped-call]
        self._client.close()
