"""What a row takes of the disk."""

from typing import Any, LiteralString

import psycopg
from psycopg.rows import tuple_row

import outbox
from bench.measure import OURS, Figure
from bench.scale.lives import live, settings_of
from bench.stage import Bench
from outbox.runtime import postgres, redis_connection
from outbox.signup.send_verify_email import SEND_VERIFY_EMAIL, SendVerifyEmail

_WAL = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
_SIZES = "SELECT pg_table_size('outbox'), pg_indexes_size('outbox')"


def of_bytes(bench: Bench, at_rest: tuple[float, float]) -> list[Figure]:
    """Measures what a row's life takes, and puts beside it what `bytes_at_rest` has found."""
    found = [_bytes(bench) for _ in range(bench.runs)]
    titles = ("WAL of one row's life", "table of one row's life", "indexes of one row's life")
    figures = [_disk(title, [taken[place] for taken in found]) for place, title in enumerate(titles)]
    table, indexes = at_rest
    return [
        *figures,
        _disk("table of a done row, at rest", [table]),
        _disk("indexes of a done row, at rest", [indexes]),
    ]


def _disk(title: str, samples: list[float]) -> Figure:
    return Figure("scale", title, "bytes", higher_is_better=False, samples={OURS: samples})


def _bytes(bench: Bench) -> tuple[float, float, float]:
    """Returns the bytes per row that a life takes: of WAL, in the table, in the indexes."""
    bench.fresh()
    batches = bench.size(4, 1)
    settings = settings_of(bench, bench.database_url)
    rows = batches * settings.batch
    with (
        postgres.connect(bench.database_url, "bench") as connection,
        redis_connection.connect(bench.redis_url, "bench") as client,
    ):
        connection.execute("ALTER TABLE outbox SET (autovacuum_enabled = false)")
        connection.execute("CHECKPOINT")
        wal = _count(connection, _WAL)
        table, indexes = _sizes(connection)
        for number in range(rows):
            outbox.add(connection, SEND_VERIFY_EMAIL, SendVerifyEmail(username=f"user_{number}"), delay=0)
        if (lived := live(connection, client, settings, batches).rows) != rows:
            raise RuntimeError(f"{lived} of {rows} rows were handed over")
        wal = _count(connection, _WAL) - wal
        table, indexes = (later - before for later, before in zip(_sizes(connection), (table, indexes), strict=True))
    return wal / rows, table / rows, indexes / rows


def bytes_at_rest(database_url: str) -> tuple[float, float]:
    """Returns the bytes per row of a vacuumed table and of its indexes."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        rows = _count(connection, "SELECT count(*) FROM outbox")
        table, indexes = _sizes(connection)
    return table / rows, indexes / rows


def _count(connection: psycopg.Connection[Any], statement: LiteralString) -> int:
    return _numbers(connection, statement)[0]


def _sizes(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    table, indexes = _numbers(connection, _SIZES)
    return table, indexes


def _numbers(connection: psycopg.Connection[Any], statement: LiteralString) -> list[int]:
    with connection.cursor(row_factory=tuple_row) as cursor:
        row = cursor.execute(statement).fetchone()
    assert row is not None
    return [int(number) for number in row]
