"""Detects two installations that use the same Redis database by mistake."""

import math
import time

import psycopg
import redis

from outbox.errors import SharedRedisError
from outbox.queries import query
from outbox.runtime import logs
from outbox.runtime.postgres import Connection

KEY = "outbox:installation"

LIFETIME = 30
"""Seconds for which an announcement in Redis counts."""

MAX_BYTES = 200
"""Upper bound of the bytes read from another installation's id. Our ids are shorter."""

LOG_INTERVAL = 60.0
"""Seconds between two log lines about another installation."""


class Installation:
    """A Postgres database and its outbox, which each of its processes announces in Redis.

    Two installations have different rows under the same ids: workers of one would take and drop the other's jobs, and
    the sweep would hand them over again. Nothing would be lost, but hardly any work done. So a process does not start
    beside another installation. A running process logs an error and goes on, because the other one may be the mistake:
    it can get in while Redis is emptied. The announcement expires, so that a restored or replaced Postgres can use the
    same Redis half a minute after the old one's processes have stopped.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._id: str | None = None
        self._has_announced = False
        self._logged_at = -math.inf

    def identify(self, connection: Connection) -> None:
        """Reads this installation's id from Postgres; if Postgres does not give one, nothing is announced.

        Raises:
            psycopg.OperationalError: Postgres is away.
        """
        try:
            row = connection.execute(query("installation_id")).fetchone()
        except psycopg.ProgrammingError:  # the server lacks the function, or our role may not call it
            return
        assert row is not None
        self._id = row["id"]

    def announce(self) -> None:
        """Announces this installation in Redis, and looks for another one.

        Raises:
            SharedRedisError: another one is announced, and this process has not announced its own before.
            redis.RedisError: Redis is away.
        """
        if self._id is None:
            return
        own = self._id.encode()
        other = self._find_other(own)
        if other and not self._has_announced:
            raise SharedRedisError(
                f"the Redis database of REDIS_URL is in use by another installation of this service, {other!r}:"
                " give each one of its own, as in redis://host:6379/3."
                f" If that one has been stopped, start this one {LIFETIME} s later"
            )
        self._client.set(KEY, own, ex=LIFETIME)
        self._has_announced = True
        if other and time.monotonic() - self._logged_at >= LOG_INTERVAL:
            self._logged_at = time.monotonic()
            logs.get().error(
                "another installation uses this Redis database",
                other=repr(other),
                own=self._id,
                remedy="give each one of its own (REDIS_URL); until then jobs are handed over many times",
            )

    def _find_other(self, own: bytes) -> bytes | None:
        """Returns the id of another announced installation.

        A key that expires later than ours would, or never, was not written by an installation.
        """
        with self._client.pipeline() as pipeline:
            pipeline.getrange(KEY, 0, MAX_BYTES - 1)
            pipeline.pttl(KEY)
            announced_id, milliseconds = pipeline.execute()
        is_announced = 0 <= milliseconds <= LIFETIME * 1000
        return announced_id if is_announced and announced_id != own else None
