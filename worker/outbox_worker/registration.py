"""Registers a worker with RQ and listens for RQ's commands."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any
from uuid import uuid4

import redis
from redis.client import PubSub, PubSubWorkerThread
from rq.command import PUBSUB_CHANNEL_TEMPLATE
from rq.defaults import DEFAULT_WORKER_TTL
from rq.utils import now as rq_now
from rq.utils import utcformat
from rq.version import VERSION
from rq.worker import BaseWorker, WorkerStatus
from rq.worker_registration import REDIS_WORKER_KEYS, WORKERS_BY_QUEUE_KEY

from outbox.runtime import logs, redis_connection
from outbox.runtime.installation import Installation
from outbox.runtime.redaction import one_line
from outbox.runtime.stop import Stop

HEARTBEAT_INTERVAL = 15.0
"""Seconds between two registrations in Redis."""
LONGEST_COMMAND = 1000
"""Bytes; RQ's commands are shorter. A longer message is not parsed: as JSON it takes many times its size."""


class Registration:
    """The worker's entry in RQ's list: `rq info` shows it with its queues, and RQ's shutdown command stops the worker.

    Nothing else of RQ's own worker is used. Its bookkeeping of jobs (registries, executions, results, retries) would
    duplicate the rows.
    """

    def __init__(self, client: redis.Redis, queues: Iterable[str], stop: Stop) -> None:
        self.name = uuid4().hex
        self.key = f"{BaseWorker.redis_worker_namespace_prefix}{self.name}"
        self.installation = Installation(client)
        self._client = client
        self._queues = list(queues)
        self._stop = stop
        self._birth: datetime | None = None
        self._commands: PubSubWorkerThread | None = None
        self._beat_at = 0.0
        self._connected_at = 0.0

    def beat(self, *, busy: bool) -> None:
        """Registers the worker every `HEARTBEAT_INTERVAL`, and at the first call after `forget`.

        Raises:
            UnsupportedRedisError: Redis is too old, or not a single server.
            SharedRedisError: another installation uses this Redis.
            redis.RedisError: Redis is away.
        """
        now = time.monotonic()
        if now - self._connected_at > redis_connection.LIFETIME:
            self.forget()
        if now < self._beat_at:
            return
        if self._beat_at == 0.0:
            redis_connection.check_supported(self._client)  # Redis may have come back as another server
            self._connected_at = now
        self.installation.announce()
        self._register(WorkerStatus.BUSY if busy else WorkerStatus.IDLE)
        if self._commands is None or not self._commands.is_alive():
            try:
                self._subscribe()
            except RuntimeError as error:  # no thread can be started; signals still stop the worker
                logs.get().warning("RQ commands cannot be heard", error=one_line(error))
        self._beat_at = time.monotonic() + HEARTBEAT_INTERVAL

    def _register(self, state: WorkerStatus) -> None:
        beat_at = rq_now()
        self._birth = self._birth or beat_at
        entry: dict[Any, str | int] = {
            "birth": utcformat(self._birth),
            "last_heartbeat": utcformat(beat_at),
            "queues": ",".join(self._queues),
            "state": state.value,
            "pid": os.getpid(),
            "hostname": socket.gethostname(),
            "ip_address": "unknown",
            "version": VERSION,
            "python_version": sys.version,
        }
        with self._client.pipeline() as pipeline:
            # The whole entry every time: Redis may have been emptied since the last registration.
            pipeline.delete(self.key)  # in case the key was overwritten by another client
            for key in self._lists():
                pipeline.sadd(key, self.key)
            pipeline.hset(self.key, mapping=entry)
            pipeline.expire(self.key, DEFAULT_WORKER_TTL)
            for failure in pipeline.execute(raise_on_error=False):
                if isinstance(failure, Exception):  # a key of a wrong type, which the relay deletes
                    logs.get().warning("registered in part", error=one_line(failure))

    def _lists(self) -> list[str]:
        return [REDIS_WORKER_KEYS, *(WORKERS_BY_QUEUE_KEY % name for name in self._queues)]

    def forget(self) -> None:
        """Drops all connections and makes the next beat register again: Redis was away, or may be another server."""
        redis_connection.drop_connections(self._client)
        if self._commands is not None:
            self._commands.stop()  # the listener closes its own connection within a second
            self._commands = None
        self._beat_at = 0.0

    def _subscribe(self) -> None:
        listener = self._client.pubsub()
        listener.subscribe(**{PUBSUB_CHANNEL_TEMPLATE % self.name: self.obey})
        self._commands = listener.run_in_thread(sleep_time=1.0, daemon=True, exception_handler=_stop_listening)

    def obey(self, message: Mapping[str, Any]) -> None:
        """Requests a stop at RQ's shutdown command. A second one does not hurry: no client may cut handlers short.

        RQ's other commands are for processes that its own worker forks; they are ignored.
        """
        try:
            command = json.loads(message["data"])["command"] if len(message["data"]) <= LONGEST_COMMAND else None
        except (ValueError, TypeError, LookupError, RecursionError):
            command = None
        if command == "shutdown":
            self._stop.request()
        else:
            logs.get().warning("ignored an RQ command", command=repr(message["data"][:100]))

    def close(self) -> None:
        """Takes the worker off RQ's list and closes the connection."""
        if self._commands is not None:
            self._commands.stop()
        with suppress(*redis_connection.AWAY), self._client.pipeline() as pipeline:  # without Redis, the entry expires
            for key in self._lists():
                pipeline.srem(key, self.key)
            pipeline.hset(self.key, "death", utcformat(rq_now()))
            pipeline.expire(self.key, 60)
            pipeline.execute()
        self._client.close()


def _stop_listening(error: BaseException, _: PubSub, thread: PubSubWorkerThread) -> None:
    logs.get().debug("RQ commands cannot be heard", error=one_line(error))
    thread.stop()  # the next heartbeat that reaches Redis subscribes again
