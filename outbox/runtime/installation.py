"""Telling two installations apart that use the same Redis database by mistake."""

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
"""Seconds that an installation counts as there after its last process has announced it."""

MAX_BYTES = 200
"""Bytes of another's id that are read: more than ours has."""

LOG_INTERVAL = 60.0
"""Seconds between two log lines about another installation that is there."""


class Installation:
    """The Postgres database and its outbox, as all processes on it announce themselves in Redis.

    Each has its own rows, and the same ids for them: workers of one would take the other's jobs and drop them, and the
    sweep would hand them over again. Nothing is lost by that, and hardly anything gets done. So a process does not
    start beside another installation. One that runs goes on and says so: it may be the other that is there by mistake,
    and got in while Redis was emptied. Nothing of this lasts in Redis, so that a Postgres that was restored or replaced
    may use the same Redis half a minute after the old one's processes have stopped.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._id: str | None = None
        self._is_in = False
        self._told_at = -math.inf

    def identify(self, connection: Connection) -> None:
        """Asks Postgres which installation this is; where it does not say, nothing is announced.

        Raises:
            psycopg.OperationalError: Postgres is away.
        """
        try:
            found = connection.execute(query("installation_id")).fetchone()
        except psycopg.ProgrammingError:  # a server that has no such function, or lets nobody use it
            return
        assert found is not None
        self._id = found["id"]

    def announce(self) -> None:
        """Says in Redis that this installation is there, and looks for another.

        Raises:
            SharedRedisError: another is there, and this process has not begun its work yet.
            redis.RedisError: Redis is away.
        """
        if self._id is None:
            return
        own = self._id.encode()
        other = self._find_other(own)
        if other and not self._is_in:
            raise SharedRedisError(
                f"the Redis database of REDIS_URL is in use by another installation of this service, {other!r}:"
                " give each one of its own, as in redis://host:6379/3."
                f" If that one has been stopped, start this one {LIFETIME} s later"
            )
        self._client.set(KEY, own, ex=LIFETIME)
        self._is_in = True
        if other and time.monotonic() - self._told_at >= LOG_INTERVAL:
            self._told_at = time.monotonic()
            logs.get().error(
                "another installation uses this Redis database",
                other=repr(other),
                own=self._id,
                remedy="give each one of its own (REDIS_URL); until then jobs are handed over many times",
            )

    def _find_other(self, own: bytes) -> bytes | None:
        """Returns the id of another installation that is there.

        A key that stays for longer than any of ours is no installation's.
        """
        with self._client.pipeline() as pipeline:
            pipeline.getrange(KEY, 0, MAX_BYTES - 1)
            pipeline.pttl(KEY)
            found, milliseconds = pipeline.execute()
        is_announced = 0 <= milliseconds <= LIFETIME * 1000
        return found if is_announced and found != own else None
