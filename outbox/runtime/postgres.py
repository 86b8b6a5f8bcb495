"""Connections to Postgres with time limits, and what an error of Postgres means."""

import select
from contextlib import suppress
from typing import Any, Self, TypeVar

import psycopg
from psycopg import IsolationLevel
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from outbox.queries import query

T = TypeVar("T")

AWAY = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.errors.ReadOnlySqlTransaction,
    psycopg.errors.IdleInTransactionSessionTimeout,
    psycopg.errors.TransactionTimeout,
)
"""Errors that are not caused by what a statement writes, so that a later try may succeed: outages, and refusals because
of locks, time limits or a full disk. `is_outage` distinguishes the two."""

_OUTAGES = ("08", "57P", "25006", "25P03", "25P04")
"""Prefixes of SQLSTATEs that mean: the connection is lost, the server shuts down, starts or is a standby, or it ended
the session because a transaction idled or took too long."""


def is_outage(error: BaseException) -> bool:
    """Returns whether an error means that Postgres cannot be reached, accepts no writes, or ended the session.

    Any other error of Postgres refuses one statement: it was cancelled, met a lock or a deadlock, a trigger raised, or
    there was no room. The statement is rolled back, and its connection can be used again.
    """
    if not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:
        return isinstance(error, AWAY)
    return error.sqlstate.startswith(_OUTAGES) or error.diag.severity_nonlocalized in {"FATAL", "PANIC"}


def loses_connection(error: Exception, connection: psycopg.BaseConnection[Any]) -> bool:
    """Returns whether an error means an outage or has closed its connection. If not, the connection can go on."""
    return is_outage(error) or connection.closed


def may_pass(error: BaseException) -> bool:
    """Returns whether a later try, on a new connection, may succeed."""
    return isinstance(error, AWAY) or is_outage(error)


Connection = psycopg.Connection[dict[str, Any]]
"""A connection whose rows are dictionaries."""

LIMITS: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
"""libpq's limits (seconds; the last in ms), so that a peer that vanished silently is noticed."""

RECONNECT_TIMEOUT = 1.0
"""Seconds for which psycopg_pool retries, with a doubling backoff: with its default of 300, a pool sleeps for up to 2
minutes after Postgres is back. When the pool gives up, the next request for a connection makes it try again."""


ANSWER_LIMIT = 20.0
"""Time limit of a statement in seconds. A Postgres that hangs (its disk stalls, its host is paused) keeps connections
open, so that libpq's limits do not apply. Longer than the limit for a lock, whose error says more."""


CANCEL_LIMIT = 2.0
"""Time limit in seconds of a request to cancel a statement: it needs a connection of its own, and an answer."""


class LimitedConnection(psycopg.Connection[dict[str, Any]]):
    """A connection that is closed when Postgres does not answer in time, which then looks like any other outage."""

    answer_limit: float | None = None
    """Seconds; None means `ANSWER_LIMIT`."""

    @classmethod
    def connect(cls, *args: Any, **kwargs: Any) -> Self:
        """Opens a connection.

        Raises:
            psycopg.OperationalError: Postgres is away or refuses, or this process has no descriptor left.
        """
        try:
            return super().connect(*args, **kwargs)
        except OSError as error:
            raise refused_by_system(error) from error

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Waits for an answer for `timeout` seconds, or for `answer_limit`."""
        limit = self.answer_limit or ANSWER_LIMIT
        try:
            return super().wait(gen, interval, limit if timeout is None else timeout)
        except psycopg.OperationalError as error:
            cancel(self)
            raise_hung(self, error)
            raise
        except OSError as error:
            self.pgconn.finish()  # its state is unknown
            raise refused_by_system(error) from error


def refused_by_system(error: OSError) -> psycopg.OperationalError:
    """Converts an OSError into the error of an outage.

    psycopg raises the bare OSError if this process has no descriptor left.
    """
    return psycopg.OperationalError(f"the system refuses a resource that a connection needs: {error.strerror or error}")


def cancels(connection: psycopg.BaseConnection[Any]) -> bool:
    """Returns whether a connection waits for a statement that can be cancelled in bounded time.

    An abandoned statement keeps running at the server with its session and its locks, and a hundred of them use up all
    connections. Cancelling a commit that waits for a synchronous standby ends the wait: the commit is visible, and a
    fail-over may lose it. To us it has had no answer; and a later write that does get one has waited until the standby
    had both.
    """
    # An older libpq cannot limit the time of a cancellation.
    return connection.pgconn.transaction_status == TransactionStatus.ACTIVE and psycopg.capabilities.has_cancel_safe()


def cancel(connection: psycopg.Connection[Any], limit: float = CANCEL_LIMIT) -> None:
    """Cancels the statement that a connection waits for, if any, within `limit` seconds. Any thread may call it.

    Failures are ignored.
    """
    if cancels(connection):
        with suppress(psycopg.Error, OSError):
            connection.cancel_safe(timeout=limit)


class NoAnswerError(psycopg.OperationalError):
    """A statement got no answer in time, and its connection was closed."""


def raise_hung(connection: psycopg.BaseConnection[Any], error: psycopg.OperationalError) -> None:
    """Closes a connection that still waits for an answer, and raises the error for that.

    Raises:
        NoAnswerError: the connection was waiting.
    """
    if connection.pgconn.transaction_status == TransactionStatus.ACTIVE:
        connection.pgconn.finish()
        raise NoAnswerError("no answer in time") from error


def options(name: str, *, pooled: bool) -> dict[str, Any]:
    """Returns the parameters of every connection of ours: autocommit mode, `LIMITS`, and UTF-8.

    UTF-8 overrides the encoding of the URL, the role and the database.

    Args:
        name: shown by `pg_stat_activity` as the application's name.
        pooled: whether the URL leads through a pooler in transaction mode. Each transaction may get another session
            there, so none may keep state: no prepared statements, and no settings of the session.
    """
    unprepared = {"prepare_threshold": None} if pooled else {}
    return {"autocommit": True, "application_name": name, "client_encoding": "utf8", **unprepared, **LIMITS}


def connect(
    database_url: str, name: str, *, pooled: bool = False, answer_limit: float | None = None
) -> LimitedConnection:
    """Opens a connection in autocommit mode whose rows are dictionaries.

    A process opens its first connection with `pooler.connect_checked` instead.

    Args:
        database_url: the database.
        name: shown by `pg_stat_activity` as the application's name.
        pooled: whether the URL leads through a pooler in transaction mode.
        answer_limit: time limit of a statement in seconds; None means `ANSWER_LIMIT`.

    Raises:
        psycopg.OperationalError: Postgres is away or refuses.
    """
    connection = connect_unlimited(database_url, name, pooled=pooled)
    connection.answer_limit = answer_limit
    if not pooled:
        pin_session(connection)
    return connection


def connect_unlimited(database_url: str, name: str, *, pooled: bool) -> LimitedConnection:
    """Opens a connection as `connect` does, but does not change its session.

    Raises:
        psycopg.OperationalError: Postgres is away or refuses.
    """
    connection = LimitedConnection.connect(database_url, row_factory=dict_row, **options(name, pooled=pooled))
    if pooled:
        # Sent with each BEGIN, so no session keeps it.
        connection.isolation_level = IsolationLevel.READ_COMMITTED
    return connection


def pin_session(connection: Connection) -> None:
    """Sets the settings that our statements rely on, in a session that must be ours alone.

    Raises:
        psycopg.OperationalError: Postgres is away.
    """
    connection.execute(query("pin_session"))


def read_only() -> psycopg.errors.ReadOnlySqlTransaction:
    """Returns the error that Postgres raises for a write in a read-only session."""
    return psycopg.errors.ReadOnlySqlTransaction(
        "the session is read-only: the server is a standby, or default_transaction_read_only is on"
    )


def has_heard(connection: psycopg.BaseConnection[Any], timeout: float = 0.0) -> bool:
    """Returns whether anything arrives on an idle connection within `timeout` seconds.

    If so, the connection may be broken, and needs a statement to find out. A peer that closes a connection sends that,
    so a healthy idle connection needs no round trip.
    """
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(timeout * 1000))
