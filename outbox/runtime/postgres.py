"""Connections to Postgres, and whether its schema is the one that this version needs."""

import select
from contextlib import suppress
from typing import Any, Self, TypeVar

import psycopg
from psycopg import IsolationLevel
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from outbox.errors import NotMigratedError, UnsupportedDatabaseError
from outbox.queries import query, sql_folder

T = TypeVar("T")

AWAY = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.errors.ReadOnlySqlTransaction,
    psycopg.errors.IdleInTransactionSessionTimeout,
    psycopg.errors.TransactionTimeout,
)
"""The classes of errors that are not the fault of what a statement writes, so that a later try may succeed: outages,
and the refusals that come from locks, time limits and a full disk. `is_outage` tells them apart."""

_OUTAGES = ("08", "57P", "25006", "25P03", "25P04")
"""How the states begin of errors that say that the connection is lost, that the server shuts down, starts or is a
standby, or that it has ended the session because a transaction idled or took too long."""


def is_outage(error: BaseException) -> bool:
    """Returns whether an error says that Postgres cannot be reached, takes no writes, or has ended the session.

    Any other error of Postgres refuses one statement: it was cancelled, met a lock or a deadlock, a trigger raised, or
    there was no room. The statement is undone, and its connection goes on.
    """
    if not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:
        return isinstance(error, AWAY)
    return error.sqlstate.startswith(_OUTAGES) or error.diag.severity_nonlocalized in {"FATAL", "PANIC"}


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
"""libpq's limits (seconds; the last in ms), so that a peer that vanished without a word is noticed."""

RECONNECT_TIMEOUT = 1.0
"""Seconds of psycopg_pool's own backoff, which doubles: left at its 300, a pool sleeps for up to 2 minutes after
Postgres is back. When it gives up, the next request for a connection makes it try again."""


ANSWER_LIMIT = 20.0
"""Seconds that a statement of ours may take. A Postgres that hangs (its disk stalls, its host is paused) keeps its
connections open, so that libpq's limits see nothing. Longer than the limit for a lock, which is a better answer."""


CANCEL_LIMIT = 2.0
"""Seconds that a request to cancel a statement may take: it needs a connection of its own, and an answer."""


class LimitedConnection(psycopg.Connection[dict[str, Any]]):
    """A connection that is closed when Postgres does not answer in time: to its user, an outage like any other."""

    answer_limit: float | None = None
    """Seconds, where not ANSWER_LIMIT."""

    @classmethod
    def connect(cls, *args: Any, **kwargs: Any) -> Self:
        """Opens a connection.

        Raises:
            psycopg.OperationalError: Postgres is away or refuses, or this process is short of descriptors.
        """
        try:
            return super().connect(*args, **kwargs)
        except OSError as error:
            raise refused_by_system(error) from error

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Waits for an answer, `timeout` seconds or else the limit."""
        limit = self.answer_limit or ANSWER_LIMIT
        try:
            return super().wait(gen, interval, limit if timeout is None else timeout)
        except psycopg.OperationalError as error:
            cancel(self)
            raise_hung(self, error)
            raise
        except OSError as error:
            self.pgconn.finish()  # nobody knows what it still waits for
            raise refused_by_system(error) from error


def refused_by_system(error: OSError) -> psycopg.OperationalError:
    """Converts an OSError into the error of an outage.

    psycopg lets the bare OSError through where this process is short of descriptors.
    """
    return psycopg.OperationalError(f"the system refuses what a connection needs: {error.strerror or error}")


def cancels(connection: psycopg.BaseConnection[Any]) -> bool:
    """Returns whether a connection waits for a statement that can be cancelled in bounded time.

    A statement that is merely abandoned runs on at the server with its session and its locks, and some hundred of them
    let nobody in. A commit that waits for a synchronous standby ends without the standby when it is cancelled: all see
    it, and a fail-over may lose it. To us it has had no answer; and whatever is written after it, and has one, waited
    until the standby had both.
    """
    # An older libpq can only cancel without a limit.
    return connection.pgconn.transaction_status == TransactionStatus.ACTIVE and psycopg.capabilities.has_cancel_safe()


def cancel(connection: psycopg.Connection[Any], limit: float = CANCEL_LIMIT) -> None:
    """Cancels what a connection waits for, if anything, in `limit` seconds; from any thread. A failure is ignored."""
    if cancels(connection):
        with suppress(psycopg.Error, OSError):
            connection.cancel_safe(timeout=limit)


class NoAnswerError(psycopg.OperationalError):
    """A statement got no answer in time, and its connection is closed: to its user, an outage like any other."""


def raise_hung(connection: psycopg.BaseConnection[Any], error: psycopg.OperationalError) -> None:
    """Closes a connection that still waits for an answer, and raises what that means.

    Raises:
        psycopg.OperationalError: it did wait.
    """
    if connection.pgconn.transaction_status == TransactionStatus.ACTIVE:
        connection.pgconn.finish()
        raise NoAnswerError("no answer in time") from error


def options(name: str, *, pooled: bool) -> dict[str, Any]:
    """Returns what every connection of ours is opened with: autocommit mode, LIMITS, and no more than can be had.

    It speaks UTF-8, whatever the URL, the role or the database says.

    Args:
        name: shown by `pg_stat_activity` as the application's name.
        pooled: whether the URL leads through a pooler in transaction mode. Each transaction may have another session
            there, so nothing may be left in one: no prepared statements, and no settings of the session's own.
    """
    unprepared = {"prepare_threshold": None} if pooled else {}
    return {"autocommit": True, "application_name": name, "client_encoding": "utf8", **unprepared, **LIMITS}


def connect(
    database_url: str, name: str, *, pooled: bool = False, answer_limit: float | None = None
) -> LimitedConnection:
    """Opens a connection in autocommit mode whose rows are dictionaries.

    A process' first one is for `pooler.connect_checked` to open.

    Args:
        database_url: where to.
        name: shown by `pg_stat_activity` as the application's name.
        pooled: whether that leads through a pooler in transaction mode.
        answer_limit: seconds that a statement may take, where not `ANSWER_LIMIT`.

    Raises:
        psycopg.OperationalError: Postgres is away or refuses.
    """
    connection = connect_unlimited(database_url, name, pooled=pooled)
    connection.answer_limit = answer_limit
    if not pooled:
        pin_session(connection)
    return connection


def connect_unlimited(database_url: str, name: str, *, pooled: bool) -> LimitedConnection:
    """Opens a connection as `connect` does, and leaves nothing in its session.

    Raises:
        psycopg.OperationalError: Postgres is away or refuses.
    """
    connection = LimitedConnection.connect(database_url, row_factory=dict_row, **options(name, pooled=pooled))
    if pooled:
        # What is sent with each BEGIN is left in no session.
        connection.isolation_level = IsolationLevel.READ_COMMITTED
    return connection


def pin_session(connection: Connection) -> None:
    """Gives a session, which must be ours alone, the settings that our statements rely on.

    Raises:
        psycopg.OperationalError: Postgres is away.
    """
    connection.execute(query("pin_session"))


def read_only() -> psycopg.errors.ReadOnlySqlTransaction:
    """Returns the error of a session that may not write, as Postgres raises it at the first try."""
    return psycopg.errors.ReadOnlySqlTransaction(
        "the session is read-only: the server is a standby, or default_transaction_read_only is on"
    )


def has_heard(connection: psycopg.BaseConnection[Any], timeout: float = 0.0) -> bool:
    """Returns whether anything arrives on an idle connection within `timeout` seconds.

    It may be broken, and should be asked: who closes a connection says so, and to ask every time takes a round trip.
    """
    arrivals = select.poll()
    arrivals.register(connection.fileno(), select.POLLIN)
    return bool(arrivals.poll(timeout * 1000))


def migrations() -> list[str]:
    """Returns the ids of the migrations that this version knows, in order."""
    return sorted(path.stem for path in (sql_folder() / "migrations").glob("*.sql"))


def check_encoding(connection: psycopg.BaseConnection[Any]) -> None:
    """Checks that a database can hold every name. Postgres says so when it connects: that takes no statement.

    Raises:
        UnsupportedDatabaseError: it is not in UTF-8.
    """
    encoding = connection.info.parameter_status("server_encoding")
    if encoding not in {"UTF8", None}:  # a pooler may leave it out
        raise UnsupportedDatabaseError(
            f"the database {connection.info.dbname} is in {encoding}, not in UTF-8, and cannot hold every name: create"
            " one with ENCODING 'UTF8' TEMPLATE template0, and name it in DATABASE_URL"
        )


def check_applied(applied: set[str]) -> None:
    """Checks that the database has every migration that this version knows; it may have newer ones.

    Raises:
        NotMigratedError: it lacks some.
    """
    if missing := [name for name in migrations() if name not in applied]:
        raise NotMigratedError(f"the database is not migrated (it lacks {', '.join(missing)}): run 'outbox migrate'")


def check_migrated(connection: psycopg.Connection[Any]) -> None:
    """Checks a database through an open connection.

    Raises:
        UnsupportedDatabaseError: it is not in UTF-8.
        NotMigratedError: it was never migrated, or lacks migrations.
    """
    check_encoding(connection)
    try:
        applied = {row["migration_id"] for row in connection.execute(query("applied_migrations"))}
    except psycopg.errors.UndefinedTable:
        applied = set()
    check_applied(applied)
