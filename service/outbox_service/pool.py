"""The service's connections to Postgres."""

from contextlib import suppress
from typing import Any, Self, TypeVar

import psycopg
from psycopg import IsolationLevel
from psycopg.abc import PQGen
from psycopg.rows import dict_row, scalar_row
from psycopg_pool import AsyncConnectionPool

from outbox.queries import query
from outbox.runtime import postgres
from outbox.runtime.outage import Outage
from outbox.runtime.settings import ServiceSettings

T = TypeVar("T")

POOL_TIMEOUT = 5.0
"""Seconds that a request waits for a connection before it is answered with 503."""

MAX_WAITING = 500
"""Maximum requests that wait for a connection; further ones are answered with 503 at once."""


class AsyncConnection(psycopg.AsyncConnection[dict[str, Any]]):
    """A connection that closes if Postgres does not answer in time, so that the request can be answered."""

    @classmethod
    async def connect(cls, *args: Any, **kwargs: Any) -> Self:
        """Opens a connection.

        Raises:
            psycopg.OperationalError: Postgres is away or refuses, or this process is short of descriptors.
        """
        try:
            return await super().connect(*args, **kwargs)
        except OSError as error:
            raise postgres.refused_by_system(error) from error

    async def wait(  # psycopg's own signature
        self,
        gen: PQGen[T],
        interval: float = 0.1,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> T:
        """Waits for an answer for up to `timeout` seconds, by default `postgres.ANSWER_LIMIT`."""
        try:
            return await super().wait(gen, interval, postgres.ANSWER_LIMIT if timeout is None else timeout)
        except psycopg.OperationalError as error:
            try:
                if postgres.cancels(self):
                    with suppress(psycopg.Error, OSError):
                        await self.cancel_safe(timeout=postgres.CANCEL_LIMIT)
            finally:
                postgres.raise_hung(self, error)
            raise
        except OSError as error:
            self.pgconn.finish()
            raise postgres.refused_by_system(error) from error


def create_pool(settings: ServiceSettings, outage: Outage) -> AsyncConnectionPool[AsyncConnection]:
    """Returns the pool that all requests share; it connects when it is opened.

    A read-only server counts as away: after a fail-over, the old primary may return as a standby before its address
    leads to the new primary.

    Args:
        settings: the service's settings.
        outage: records that a server is read-only.
    """

    async def configure(connection: AsyncConnection) -> None:
        if settings.transaction_pooling:
            # Sent with each BEGIN, so it leaves nothing in the session.
            await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
        else:
            await connection.execute(query("pin_session"))
        try:
            await check_writable(connection)
        except psycopg.errors.ReadOnlySqlTransaction as error:
            outage.away(error)
            await connection.close()
            raise

    return AsyncConnectionPool(
        settings.database_url,
        connection_class=AsyncConnection,
        kwargs={"row_factory": dict_row, **postgres.options("outbox service", pooled=settings.transaction_pooling)},
        min_size=1,
        max_size=settings.pool_size,
        timeout=POOL_TIMEOUT,
        reconnect_timeout=postgres.RECONNECT_TIMEOUT,
        max_waiting=MAX_WAITING,
        configure=configure,
        check=_check,
        open=False,
    )


async def _check(connection: AsyncConnection) -> None:
    if postgres.has_heard(connection):
        await AsyncConnectionPool.check_connection(connection)


async def check_writable(connection: AsyncConnection) -> None:
    """Checks that the session may write.

    Raises:
        psycopg.errors.ReadOnlySqlTransaction: it may not.
    """
    cursor = connection.cursor(row_factory=scalar_row)
    await cursor.execute(query("is_read_only"))
    if await cursor.fetchone():
        raise postgres.read_only()
