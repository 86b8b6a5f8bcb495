"""A pool of connections to Postgres, shared by all handlers of a worker."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import psycopg
from psycopg import Connection, Copy, Cursor
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg_pool import ConnectionPool, PoolTimeout

from outbox.errors import NotNowError, TimeLimitError
from outbox.queries import query
from outbox.runtime import logs, postgres
from outbox.runtime.postgres import T
from outbox.runtime.tally import Tally
from outbox_worker import deadline

WAIT = 10.0
"""Maximum seconds that a handler waits for a connection; then its row is given back, and the attempt does not count."""
FINISHING_TIME = 1.0
"""Minimum seconds for a statement, even if the attempt has less time left: enough to commit."""


class HandlerCursor(Cursor[Any]):
    """A cursor that begins no statement once the attempt's time is over. A commit is still possible.

    Server-side cursors (those with a name) are not limited.
    """

    def execute(self, *args: Any, **kwargs: Any) -> Self:
        """Executes a statement.

        Raises:
            TimeLimitError: the attempt has no time left.
        """
        deadline.check()
        return super().execute(*args, **kwargs)

    def executemany(self, *args: Any, **kwargs: Any) -> None:
        """Executes a statement once per set of parameters.

        Raises:
            TimeLimitError: the attempt has no time left.
        """
        deadline.check()
        super().executemany(*args, **kwargs)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Executes a statement and returns its rows one by one.

        Raises:
            TimeLimitError: the attempt has no time left.
        """
        deadline.check()
        return super().stream(*args, **kwargs)

    @contextmanager
    def copy(self, *args: Any, **kwargs: Any) -> Iterator[Copy]:
        """Runs a COPY.

        Raises:
            TimeLimitError: the attempt has no time left.
        """
        deadline.check()
        with super().copy(*args, **kwargs) as copy:
            yield copy


class HandlerConnection(postgres.LimitedConnection):
    """A connection that limits each statement to the attempt's time left, but to no less than FINISHING_TIME."""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Waits for an answer: for `timeout` seconds if given, else as long as the attempt has time.

        Raises:
            TimeLimitError: the attempt's time was over before the answer came.
        """
        if timeout is not None:
            return super().wait(gen, interval, timeout)
        timeout = min(postgres.ANSWER_LIMIT, max(FINISHING_TIME, deadline.remaining()))
        try:
            return super().wait(gen, interval, timeout)
        except psycopg.OperationalError as error:
            if self.closed and not deadline.remaining():
                raise TimeLimitError("the attempt's time is over") from error
            raise


class NoConnectionError(NotNowError, PoolTimeout):
    """A handler got no connection in time: all are lent, or Postgres is away. Its attempt does not count."""


class HandlerPool(ConnectionPool[Connection[Any]]):
    """A pool that runs each `connection()` block as one transaction: its end commits, an exception rolls back."""

    def __init__(self, database_url: str, *, size: int = 4, pooled: bool = False) -> None:
        self._tally = Tally()
        options = {**postgres.options("outbox worker handlers", pooled=pooled), "autocommit": False}
        self._lent: set[Connection[Any]] = set()
        super().__init__(
            database_url,
            connection_class=HandlerConnection,
            kwargs={"row_factory": tuple_row, "cursor_factory": HandlerCursor, **options},
            min_size=0,
            max_size=size,
            timeout=WAIT,
            reconnect_timeout=postgres.RECONNECT_TIMEOUT,
            configure=_check_writable if pooled else _limit_session,
            check=_check,
            open=False,
        )

    @contextmanager
    def connection(self, timeout: float | None = None) -> Iterator[Connection[Any]]:
        """Lends a connection for one transaction.

        Args:
            timeout: maximum seconds to wait for it; `WAIT` by default.
        """
        with super().connection(timeout) as lent:
            try:
                yield lent
            except psycopg.errors.ReadOnlySqlTransaction:
                lent.close()  # a new one may reach the new primary
                raise

    def getconn(self, timeout: float | None = None) -> Connection[Any]:
        """Lends a connection. Waits at most `timeout` seconds, and only as long as the attempt has time.

        Raises:
            TimeLimitError: the attempt has no time left.
            NoConnectionError: no connection became free in time.
        """
        timeout = deadline.begin_step(self.timeout if timeout is None else timeout)
        try:
            connection = super().getconn(timeout)
        except PoolTimeout as error:
            if times := self._tally.count():
                logs.get().warning("no connection for a handler", size=self.max_size, times=times)
            raise NoConnectionError(
                f"no connection within {timeout:.1f} s: all {self.max_size} are lent, or Postgres is away"
            ) from error
        self._lent.add(connection)
        return connection

    def putconn(self, conn: Connection[Any]) -> None:
        """Takes back a lent connection."""
        self._lent.discard(conn)
        _reset(conn)  # the pool's own reset runs in another thread, which the next handler would wait for
        super().putconn(conn)

    def cancel(self, limit: float) -> None:
        """Cancels the statements that handlers wait for, within `limit` seconds, before the process exits."""
        ends_at = time.monotonic() + limit
        for connection in list(self._lent):
            if (left := ends_at - time.monotonic()) > 0:
                postgres.cancel(connection, left)


def _check(connection: Connection[Any]) -> None:
    """Makes the pool drop a broken connection: otherwise an outage costs each of the next handlers an attempt."""
    if postgres.has_heard(connection):
        ConnectionPool.check_connection(connection)


def _reset(connection: Connection[Any]) -> None:
    """Undoes what a handler may have set on a connection, so that the next one gets a plain transaction."""
    try:
        if connection.pgconn.transaction_status != TransactionStatus.IDLE:
            connection.rollback()
        if connection.autocommit:
            connection.autocommit = False
        if connection.isolation_level is not None:
            connection.isolation_level = None
        if connection.read_only is not None:
            connection.read_only = None
        if connection.deferrable is not None:
            connection.deferrable = None
        connection.row_factory, connection.cursor_factory = tuple_row, HandlerCursor
    except (psycopg.Error, TimeLimitError):
        connection.close()  # the pool opens another


def _limit_session(connection: Connection[Any]) -> None:
    connection.execute(query("limit_handler_session"))
    connection.commit()
    _check_writable(connection)


def _check_writable(connection: Connection[Any]) -> None:
    """Rejects a standby, which the address may still lead to after a fail-over: the pool connects again."""
    row = connection.execute(query("is_read_only")).fetchone()
    connection.commit()
    assert row is not None
    if row[0]:
        connection.close()
        raise postgres.read_only()
