"""Applies `sql/migrations`: each one and its record in one transaction, one process at a time.

The records are in the tables of yoyo, which applied them before. It wrote a migration and its record in two
transactions and looked up names of host and user in between: a run that was killed there left a database that no later
run could migrate. Earlier versions can still read these tables, and be used again.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
from psycopg import IsolationLevel
from psycopg.rows import dict_row

from outbox.errors import LockedError, NotMigratedError, RightsError
from outbox.queries import query, sql_folder
from outbox.runtime import logs, postgres
from outbox.runtime.postgres import Connection

LOCK_TIMEOUT = 3.0
"""Seconds that a migration waits for a lock, and with it all who want its table afterwards. Longer than Postgres'
`deadlock_timeout` (1 s), after which an autovacuum gives way."""

TRIES = 5
"""How often a migration that cannot have its lock is tried."""

PAUSE = 5.0
"""Seconds between two tries, in which those go on who have waited behind it."""

PATIENCE = 10.0
"""Seconds between two log lines of a process that waits for another one to finish its migration."""


def migrate(database_url: str) -> list[str]:
    """Applies the migrations that the database lacks, each in its own transaction, while others use the database.

    Args:
        database_url: the database.

    Returns:
        The ids of the migrations applied now, in order; empty where there were none to apply.

    Raises:
        UnsupportedDatabaseError: the database is not in UTF-8.
        RightsError: the database lacks migrations, and the role may create no tables; or a table by a name of ours,
            or the schema by our role's name, belongs to another role.
        LockedError: others held a table for too long; the migrations before this one are applied, and nothing of it.
        psycopg.OperationalError: Postgres is away.
    """
    applied: list[str] = []
    with _connect(database_url) as connection:
        postgres.check_encoding(connection)
        _check_owners(connection)
        if _may_create(connection):
            try:
                _when_free("records", _create_records, connection)
            except (psycopg.errors.UniqueViolation, psycopg.errors.DuplicateTable):  # another process did so meanwhile
                _when_free("records", _create_records, connection)
            applied = [name for name in postgres.migrations() if _when_free(name, _apply, connection)]
    logs.get().info("db migrated", applied=applied)
    return applied


def _connect(database_url: str) -> Connection:
    """Opens a connection that a pooler may stand in, and whose statements may take any time."""
    connection = psycopg.connect(database_url, row_factory=dict_row, **postgres.options("outbox migrate", pooled=True))
    # After a wait for another process, the statements must see what that one has applied.
    connection.isolation_level = IsolationLevel.READ_COMMITTED
    return connection


def _check_owners(connection: Connection) -> None:
    """Checks that no other role has planted a schema or a table where ours are, or where they would be.

    Raises:
        RightsError: one has.
    """
    for found in connection.execute(query("foreign_schema")):
        raise RightsError(
            f"the schema {found['name']}, which search_path finds because it has our role's name, belongs to the role"
            f" {found['owner']}: drop it, REVOKE CREATE ON DATABASE from that role, and run {found['statement']}"
        )
    for found in connection.execute(query("foreign_tables")):
        raise RightsError(
            f"the table {found['name']} belongs to the role {found['owner']}, and the schema to another: migrate as"
            f" {found['owner']} if you trust it; else drop that table, and REVOKE CREATE ON SCHEMA from all other roles"
        )


def _create_records(connection: Connection, name: str) -> bool:
    """Makes the tables in which migrations are recorded, where they are not there."""
    with connection.transaction():
        connection.execute(query("unlimit_transaction"))
        # A role that may create in our schema could hold one of these names in a transaction that never ends.
        connection.execute(query("limit_migration"), {"lock_timeout": LOCK_TIMEOUT})
        connection.execute((sql_folder() / f"{name}.sql").read_bytes())
        _check_owners(connection)  # again: one that was planted meanwhile is visible now that the names are taken
        connection.execute(query("record_version"))
    return True


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Runs a block in a transaction, when no other process migrates."""
    with connection.transaction():
        while not _lock(connection):
            logs.get().warning("migration waits for another process that migrates")
        connection.execute(query("unlimit_transaction"))
        yield


def _lock(connection: Connection) -> bool:
    """Takes the lock for this transaction and returns whether it could be had within `PATIENCE`."""
    try:
        with connection.transaction():
            connection.execute(query("limit_migration"), {"lock_timeout": PATIENCE})
            connection.execute(query("lock_migrations"))
    except psycopg.errors.LockNotAvailable:
        return False
    return True


def _may_create(connection: Connection) -> bool:
    """Returns whether the role may create tables; one that may not need not where everything is applied.

    Raises:
        RightsError: it may not, and need be.
    """
    right = connection.execute(query("right_to_create")).fetchone()
    assert right is not None
    if right["has"]:
        return True
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
    return False


def _when_free(name: str, apply: Callable[[Connection, str], bool], connection: Connection) -> bool:
    """Applies a migration, or the records, as soon as the tables are free, and returns whether it had to be applied.

    Raises:
        LockedError: they were not, at any of `TRIES` tries.
    """
    for left in reversed(range(TRIES)):
        try:
            return apply(connection, name)
        except psycopg.errors.LockNotAvailable as error:
            if not left:
                raise LockedError(
                    f"migration {name} is not applied: others, such as a dump or a long transaction, held a table"
                    f" that it changes, at each of {TRIES} tries. Nothing of it was done:"
                    " run 'outbox migrate' again when they have ended (pg_stat_activity shows them)"
                ) from error
        logs.get().warning("migration waits for a lock", migration=name, next_try=PAUSE)
        time.sleep(PAUSE)
    raise AssertionError("TRIES is positive")


def _apply(connection: Connection, name: str) -> bool:
    """Applies and records a migration, unless it is recorded, and returns whether it was not."""
    with _alone(connection):
        if name in {row["migration_id"] for row in connection.execute(query("applied_migrations"))}:
            return False
        connection.execute(query("limit_migration"), {"lock_timeout": LOCK_TIMEOUT})
        if name == postgres.migrations()[0] and _is_left_unrecorded(connection):
            _check_owners(connection)
            logs.get().warning(
                "migration was not recorded", migration=name, why="an earlier version's 'outbox migrate' was cut short"
            )
        else:
            connection.execute((sql_folder() / "migrations" / f"{name}.sql").read_bytes())
        connection.execute(query("record_migration"), {"migration": name})
    return True


def _is_left_unrecorded(connection: Connection) -> bool:
    """Returns whether the first migration is applied, though it is not recorded.

    The others of the versions that could leave one unrecorded may be applied twice.
    """
    found = connection.execute(query("first_migration")).fetchone()
    assert found is not None
    return bool(found["is_applied"])
