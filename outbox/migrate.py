"""Applies `sql/migrations`, one process at a time."""

import time
from collections import Counter
from typing import Any

import psycopg
from psycopg.rows import dict_row
from yoyo import read_migrations
from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
from yoyo.connections import parse_uri

from outbox import logs, postgres
from outbox.errors import LockedError, NotMigratedError, RightsError
from outbox.queries import query, sql_folder

LOCK_TIMEOUT = 3.0
"""Seconds that a migration waits for a lock, and with it all who want its table afterwards. Longer than Postgres'
`deadlock_timeout` (1 s), after which an autovacuum gives way."""

TRIES = 5
"""How often a migration that cannot have its lock is tried."""

PAUSE = 5.0
"""Seconds between two tries, in which those go on who have waited behind it."""


class _Backend(PostgresqlPsycopgBackend):  # type: ignore[misc]  # yoyo is untyped
    """yoyo's backend on a connection string that libpq reads itself, so that all of its options work."""

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        super().__init__(parse_uri("postgresql+psycopg:///"), "_yoyo_migration")

    def copy(self) -> "_Backend":
        return _StepsBackend(self._database_url)

    def connect(self, dburi: Any) -> psycopg.Connection[Any]:  # noqa: ARG002 - yoyo's signature
        return _connect(self._database_url, autocommit=True)


class _StepsBackend(_Backend):
    """The backend on which yoyo executes a migration. It notes on the other one, without a limit, that it has."""

    def begin(self) -> None:
        super().begin()
        self.connection.execute(query("limit_migration"), {"lock_timeout": LOCK_TIMEOUT})


def _connect(database_url: str, *, autocommit: bool = False) -> psycopg.Connection[Any]:
    """Opens a connection that a pooler may stand in: it prepares no statements."""
    return psycopg.connect(
        database_url, **{**postgres.options("outbox migrate", pooled=True), "autocommit": autocommit}
    )


def migrate(database_url: str) -> list[str]:
    """Applies the migrations that the database lacks, each in its own transaction, while others use the database.

    Postgres' advisory lock lets one process in at a time; the others find nothing left to do. yoyo's own lock is a
    row that a killed process leaves behind; inside ours it can only be such a leftover, so it is removed.

    Args:
        database_url: the database.

    Returns:
        The ids of the migrations applied now, in order; empty where there were none to apply.

    Raises:
        UnsupportedDatabaseError: the database is not in UTF-8.
        RightsError: the database lacks migrations, and the role may create no tables.
        LockedError: others held a table for too long; the migrations before this one are applied, and nothing of it.
        psycopg.OperationalError: Postgres is away.
    """
    # Not postgres.connect: this transaction idles for as long as the migrations take.
    with _connect(database_url) as connection:
        connection.row_factory = dict_row
        postgres.check_encoding(connection)
        connection.execute(query("unlimit_transaction"))
        connection.execute(query("lock_migrations"))
        _check_right(connection)
        with _Backend(database_url) as backend:
            backend.init_database()
            backend.break_lock()
            with backend.lock():
                applied = _apply(backend)
    logs.get().info("db migrated", applied=applied)
    return applied


def _check_right(connection: psycopg.Connection[Any]) -> None:
    """Checks that the role may create tables, or need not.

    yoyo takes a table that it cannot create for one that is there, and a refusal for a server on which a migration
    cannot be a transaction.
    """
    right = connection.execute(query("right_to_create")).fetchone()
    assert right is not None
    if right["has"]:
        return
    try:
        postgres.check_migrated(connection)
    except NotMigratedError as error:
        if right["statement"] is None:
            raise RightsError(
                f"the role {right['role']} may use no schema in its search_path, so it cannot create tables: create one"
                " for it (CREATE SCHEMA … AUTHORIZATION …), or grant it USAGE and CREATE on one that is in search_path"
            ) from error
        raise RightsError(
            f"the role {right['role']} may not create tables in its schema: run {right['statement']}, as the schema's"
            " owner, and then 'outbox migrate' again"
        ) from error


def _apply(backend: _Backend) -> list[str]:
    known = read_migrations(str(sql_folder() / "migrations"))
    applied = [migration.id for migration in backend.to_apply(known)]
    tries: Counter[str] = Counter()
    while True:
        try:
            backend.apply_migrations(backend.to_apply(known))
        except psycopg.errors.LockNotAvailable as error:
            waiting = backend.to_apply(known)[0].id
            tries[waiting] += 1
            if tries[waiting] == TRIES:
                raise LockedError(
                    f"migration {waiting} is not applied: others, such as a dump or a long transaction, held a table"
                    f" that it changes, at each of {TRIES} tries. Nothing of it was done:"
                    " run 'outbox migrate' again when they have ended (pg_stat_activity shows them)"
                ) from error
            logs.get().warning("migration waits for a lock", migration=waiting, next_try=PAUSE)
            time.sleep(PAUSE)
        else:
            return applied
