"""Fills large tables quickly, with rows as the processes would leave them."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, LiteralString
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from bench.testbed import Bench

_CONNECTION_COUNT = 2
"""Number of connections that insert concurrently."""

_PENDING = """
INSERT INTO outbox (task, payload, queue, max_retries, request_id)
SELECT 'send_verify_email', jsonb_build_object('username', 'user_' || number),
       queues[1 + number %% cardinality(queues)], 10, md5(number::text)
FROM generate_series(%(first)s::bigint, %(last)s) AS number, (VALUES (%(queues)s::text[])) AS given (queues)
"""
_DONE = """
INSERT INTO outbox (task, payload, queue, max_retries, request_id, status, delivery, attempts, worker,
                    run_at, created_at, enqueued_at, started_at, done_at)
SELECT 'send_verify_email', jsonb_build_object('username', 'user_' || number), 'critical', 10, md5(number::text),
       'done', 1, 1, '00000000000000000000000000000000', at, at, at, at, at
FROM generate_series(%(first)s::bigint, %(last)s) AS number,
     LATERAL (SELECT now() - make_interval(secs => number * 0.001) AS at) AS times
"""
"""Rows are a millisecond apart: ten million span less than three hours, which is shorter than any retention."""


def add_pending(database_url: str, rows: int, queues: Sequence[str] = ("critical", "default")) -> None:
    """Adds due rows, evenly distributed over the queues."""
    _insert(database_url, _PENDING, rows, queues=list(queues))
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE) outbox")


def add_done(database_url: str, rows: int) -> None:
    """Adds rows that were done within the last hours, and vacuums the table, as autovacuum would have.

    The primary key, the index `outbox_done` and the checks are dropped before the rows are inserted and created again
    afterwards, the checks as NOT VALID. That is three times as fast and leaves the same table.
    """
    with psycopg.connect(database_url, autocommit=True) as connection, _without_indexes_and_checks(connection):
        _insert(database_url, _DONE, rows)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE) outbox")


@contextmanager
def _without_indexes_and_checks(connection: psycopg.Connection[Any]) -> Iterator[None]:
    indexes = _definitions(
        connection,
        "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'outbox' AND indexname = 'outbox_done'",
    )
    constraints = _definitions(
        connection,
        "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE conrelid = 'outbox'::regclass AND contype IN ('p', 'c')",
    )
    for name in constraints:
        connection.execute(sql.SQL("ALTER TABLE outbox DROP CONSTRAINT {}").format(sql.Identifier(name)))
    for name in indexes:
        connection.execute(sql.SQL("DROP INDEX {}").format(sql.Identifier(name)))
    yield
    connection.execute("SET maintenance_work_mem = '512MB'")
    for name, definition in constraints.items():
        suffix = " NOT VALID" if definition.startswith("CHECK") else ""
        add = sql.SQL("ALTER TABLE outbox ADD CONSTRAINT {} ").format(sql.Identifier(name))
        connection.execute(add + sql.SQL(_trusted(definition + suffix)))
    for definition in indexes.values():
        connection.execute(sql.SQL(_trusted(definition)))


def clone(bench: Bench, database_url: str) -> str:
    """Copies a database that has no connections, and returns the URL of the copy."""
    copy = bench.create_database()
    name, original = (sql.Identifier(urlsplit(url).path.removeprefix("/")) for url in (copy, database_url))
    with bench.connect_to_server() as connection:
        connection.execute(sql.SQL("DROP DATABASE {}").format(name))
        # Copies files instead of pages through the WAL. Before Postgres 15 this was the only strategy.
        strategy = sql.SQL(" STRATEGY file_copy" if connection.info.server_version >= 150_000 else "")
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(name, original) + strategy)
    return copy


def _insert(database_url: str, statement: LiteralString, rows: int, **parameters: object) -> None:
    part_size = -(-rows // _CONNECTION_COUNT)
    parts = [{"first": first, "last": min(first + part_size - 1, rows)} for first in range(1, rows + 1, part_size)]

    def insert(part: dict[str, int]) -> None:
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute(statement, {**parameters, **part})

    with ThreadPoolExecutor(_CONNECTION_COUNT) as threads:
        list(threads.map(insert, parts))


def _definitions(connection: psycopg.Connection[Any], statement: LiteralString) -> dict[str, str]:
    return {str(name): str(definition) for name, definition in connection.execute(statement)}


def _trusted(definition: str) -> LiteralString:
    """Marks a definition from the catalog of Postgres as trusted SQL."""
    return definition
