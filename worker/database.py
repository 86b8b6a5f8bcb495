"""The connections to Postgres that all handlers of a worker share."""

from typing import Any

from psycopg import Connection
from psycopg.rows import tuple_row
from psycopg_pool import ConnectionPool

from outbox import postgres
from outbox.queries import query
from worker.limit import held_back

SIZE = 4
WAIT = 10.0
"""Seconds that a handler may wait for a connection: an outage that is shorter costs no attempt."""


class HandlerPool(ConnectionPool[Connection[Any]]):
    """A pool from which an attempt's time limit tears no connection: struck in the wait, it would lose it for good."""

    def __init__(self, database_url: str, *, pooled: bool = False) -> None:
        super().__init__(
            database_url,
            connection_class=postgres.LimitedConnection,
            kwargs={"row_factory": tuple_row, **postgres.options("outbox worker handlers", pooled=pooled)},
            min_size=0,
            max_size=SIZE,
            timeout=WAIT,
            reconnect_timeout=postgres.RECONNECT_TIMEOUT,
            configure=None if pooled else _limit_session,
            check=_check,
            open=False,
        )

    def getconn(self, timeout: float | None = None) -> Connection[Any]:
        """Lends a connection; the time limit of the attempt waits meanwhile."""
        with held_back():
            return super().getconn(timeout)

    def putconn(self, conn: Connection[Any]) -> None:
        """Takes a connection back; the time limit of the attempt waits meanwhile."""
        with held_back():
            super().putconn(conn)


def _check(connection: Connection[Any]) -> None:
    """Makes the pool drop a broken connection: an outage must not cost the next handlers an attempt each."""
    if postgres.has_heard(connection):
        ConnectionPool.check_connection(connection)


def _limit_session(connection: Connection[Any]) -> None:
    connection.execute(query("limit_session"))
