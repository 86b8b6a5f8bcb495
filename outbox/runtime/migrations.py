"""Applies `sql/migrations`: each migration with its record in one transaction, one process at a time.

The records are in the tables of yoyo, which earlier versions used. It wrote a migration and its record in two
transactions and looked up the names of host and user in between: a run killed there left a database that no later run
could migrate. Earlier versions can still read these tables, so that a rollback works.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
from psycopg import IsolationLevel
from psycopg.rows import dict_row

from outbox.errors import LockedError, NotMigratedError, RightsError
from outbox.queries import query, sql_folder
from outbox.runtime import logs, postgres, schema
from outbox.runtime.postgres import Connection

LOCK_TIMEOUT = 3.0
"""Seconds that a migration waits for a lock; sessions that want the table later wait behind it. Longer than Postgres'
`deadlock_timeout` (1 s), after which an autovacuum gives way."""

TRIES = 5
"""How often a migration that does not get its lock is tried."""

PAUSE = 5.0
"""Seconds between two tries, in which the sessions that waited behind it run."""

PATIENCE = 10.0
"""Seconds between two log lines of a process that waits for another process to migrate."""


def migrate(database_url: str) -> list[str]:
    """Applies the migrations that the database lacks, each in its own transaction, while the processes run.

    Returns:
        The ids of the migrations applied now, in order.

    Raises:
        UnsupportedDatabaseError: the database is not in UTF-8.
        RightsError: the database lacks migrations, and the role may not create tables; or another role owns a table
            with one of our names, or the schema with our role's name.
        LockedError: other sessions held a table for too long; the migrations before this one are applied, and nothing
            of this one.
        psycopg.OperationalError: Postgres is away.
    """
    applied: list[str] = []
    with _connect(database_url) as connection:
        schema.check_encoding(connection)
        _check_owners(connection)
        if _may_create(connection):
            try:
                _retry_locked("records", _create_records, connection)
            except (psycopg.errors.UniqueViolation, psycopg.errors.DuplicateTable):  # another process created them
                _retry_locked("records", _create_records, connection)
            applied = [name for name in schema.migrations() if _retry_locked(name, _apply, connection)]
    logs.get().info("db migrated", applied=applied)
    return applied


def _connect(database_url: str) -> Connection:
    """Opens a connection without a limit for statements; it may lead through a pooler."""
    connection = psycopg.connect(database_url, row_factory=dict_row, **postgres.options("outbox migrate", pooled=True))
    # After a wait for another process, statements must see what that process applied.
    connection.isolation_level = IsolationLevel.READ_COMMITTED
    return connection


def _check_owners(connection: Connection) -> None:
    """Checks that no other role owns a schema or table that our names lead to.

    Raises:
        RightsError: another role does.
    """
    for found in connection.execute(query("foreign_schema")):
        raise RightsError(
            f"the schema {found['name']}, which search_path finds because it has our role's name, belongs to the role"
            f" {found['owner']}: drop it, REVOKE CREATE ON DATABASE from that role, and run {found['statement']}"
        )
    for table in connection.execute(query("foreign_tables")):
        raise RightsError(
            f"the table {table['name']} belongs to the role {table['owner']}, and the schema to another: migrate as"
            f" {table['owner']} if you trust it; else drop that table, and REVOKE CREATE ON SCHEMA from all other roles"
        )


def _create_records(connection: Connection, name: str) -> bool:
    """Creates the tables that record migrations, if they do not exist."""
    with connection.transaction():
        connection.execute(query("unlimit_transaction"))
        # A role that may create in our schema can hold one of these names in a transaction that never ends.
        connection.execute(query("limit_migration"), {"lock_timeout": LOCK_TIMEOUT})
        connection.execute((sql_folder() / f"{name}.sql").read_bytes())
        _check_owners(connection)  # again: a table planted since the first check is visible once our tables exist
        connection.execute(query("record_version"))
    return True


@contextmanager
def _locked(connection: Connection) -> Iterator[None]:
    """Runs the block in a transaction while no other process migrates."""
    with connection.transaction():
        while not _lock(connection):
            logs.get().warning("migration waits for another process that migrates")
        connection.execute(query("unlimit_transaction"))
        yield


def _lock(connection: Connection) -> bool:
    """Takes the lock for this transaction; returns whether that succeeded within `PATIENCE`."""
    try:
        with connection.transaction():
            connection.execute(query("limit_migration"), {"lock_timeout": PATIENCE})
            connection.execute(query("lock_migrations"))
    except psycopg.errors.LockNotAvailable:
        return False
    return True


def _may_create(connection: Connection) -> bool:
    """Returns whether the role may create tables.

    Raises:
        RightsError: it may not, and the database lacks migrations.
    """
    right = connection.execute(query("right_to_create")).fetchone()
    assert right is not None
    if right["has"]:
        return True
    try:
        schema.check_migrated(connection)
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
    return False


def _retry_locked(name: str, apply: Callable[[Connection, str], bool], connection: Connection) -> bool:
    """Applies a migration or creates the records, and tries again while tables are locked.

    Returns:
        Whether it was applied now.

    Raises:
        LockedError: a table was locked at each of `TRIES` tries.
    """
    for tries_left in reversed(range(TRIES)):
        try:
            return apply(connection, name)
        except psycopg.errors.LockNotAvailable as error:
            if not tries_left:
                raise LockedError(
                    f"migration {name} is not applied: another session, such as a dump or a long transaction, held a"
                    f" table that it changes at each of {TRIES} tries. Nothing of it was done:"
                    " run 'outbox migrate' again when that session has ended (pg_stat_activity shows it)"
                ) from error
        logs.get().warning("migration waits for a lock", migration=name, next_try=PAUSE)
        time.sleep(PAUSE)
    raise AssertionError("TRIES is positive")


def _apply(connection: Connection, name: str) -> bool:
    """Applies and records a migration unless it is recorded; returns whether it was applied now."""
    with _locked(connection):
        if name in {row["migration_id"] for row in connection.execute(query("applied_migrations"))}:
            return False
        connection.execute(query("limit_migration"), {"lock_timeout": LOCK_TIMEOUT})
        if name == schema.migrations()[0] and _is_left_unrecorded(connection):
            _check_owners(connection)
            logs.get().warning(
                "migration was not recorded", migration=name, why="an earlier version's 'outbox migrate' was cut short"
            )
        else:
            connection.execute((sql_folder() / "migrations" / f"{name}.sql").read_bytes())
        connection.execute(query("record_migration"), {"migration": name})
    return True


def _is_left_unrecorded(connection: Connection) -> bool:
    """Returns whether the first migration is applied although it is not recorded.

    The later migrations of the versions that could leave one unrecorded need no such check: they may be applied twice.
    """
    row = connection.execute(query("first_migration")).fetchone()
    assert row is not None
    return bool(row["is_applied"])
