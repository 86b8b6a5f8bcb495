"""The connections to Postgres that all handlers of a worker share."""

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
"""Seconds that a handler may wait for a connection; then its row is given back, and no attempt counts."""
FINISHING_TIME = 1.0
"""Seconds that a statement gets at least, even if the attempt's time is nearly over: to commit what was done in it."""


class HandlerCursor(Cursor[Any]):
    """A cursor that begins no statement once the attempt's time is over; what was done may still be committed.

    A cursor with a name is Postgres' own, and not limited so.
    """

    def execute(self, *args: Any, **kwargs: Any) -> Self:
        """Executes a statement.

        Raises:
            TimeLimitError: the attempt has no time left.
        """
        deadline.check()
        return super().execute(*args, **kwargs)

    def executemany(self, *args: Any, **kwargs: Any) -> None:
        """Executes a statement for each of many parameters.

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
    """A connection whose statements wait no longer than the attempt has time, or FINISHING_TIME where that is less."""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Waits for an answer, `timeout` seconds or else what both limits leave.

        Raises:
            TimeLimitError: the attempt's time was over before there was one.
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
    """A handler got no connection in time: all are lent, or Postgres is away. That is no fault of its row."""


class HandlerPool(ConnectionPool[Connection[Any]]):
    """A pool whose `connection()` is one transaction: the end of its block commits it, an exception rolls it back."""

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
        """Lends a connection for a block that is one transaction.

        Args:
            timeout: seconds to wait for it at most, where not `WAIT`.
        """
        with super().connection(timeout) as lent:
            try:
                yield lent
            except psycopg.errors.ReadOnlySqlTransaction:
                lent.close()  # the next one may lead to a new primary
                raise

    def getconn(self, timeout: float | None = None) -> Connection[Any]:
        """Lends a connection, after `timeout` seconds at most, and while the attempt has time.

        Raises:
            TimeLimitError: it has none left.
            NoConnectionError: none could be had in time.
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
        """Takes a connection back."""
        self._lent.discard(conn)
        _reset(conn)  # not by the pool: that would do it in a thread of its own, and the next handler waits for that
        super().putconn(conn)

    def cancel(self, limit: float) -> None:
        """Cancels at the server what handlers wait for, in `limit` seconds, as the process is about to exit."""
        ends = time.monotonic() + limit
        for connection in list(self._lent):
            if (left := ends - time.monotonic()) > 0:
                postgres.cancel(connection, left)


def _check(connection: Connection[Any]) -> None:
    """Makes the pool drop a broken connection: an outage must not cost the next handlers an attempt each."""
    if postgres.has_heard(connection):
        ConnectionPool.check_connection(connection)


def _reset(connection: Connection[Any]) -> None:
    """Undoes what a handler may have set on a connection, so that the next one's block is a transaction as ever."""
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
    """Refuses a standby, which the address may still lead to after a fail-over: the pool tries anew."""
    row = connection.execute(query("is_read_only")).fetchone()
    connection.commit()
    assert row is not None
    if row[0]:
        connection.close()
        raise postgres.read_only()
