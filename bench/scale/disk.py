"""Measures the disk space and WAL per row."""

from typing import Any, LiteralString

import psycopg
from psycopg.rows import tuple_row

import outbox
from bench.figure import OURS, Figure
from bench.scale.lifecycle import relay_settings, run_lifecycle
from bench.testbed import Bench
from outbox.runtime import postgres, redis_connection
from outbox.signup.send_verify_email import SEND_VERIFY_EMAIL, SendVerifyEmail

_WAL = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
_SIZES = "SELECT pg_table_size('outbox'), pg_indexes_size('outbox')"


def measure_disk(bench: Bench, at_rest: tuple[float, float]) -> list[Figure]:
    """Measures the bytes of a row's life, and adds figures for the result of `bytes_at_rest`."""
    runs = [_measure_life(bench) for _ in range(bench.runs)]
    titles = ("WAL per row", "table growth per row", "index growth per row")
    figures = [_figure(title, [run[index] for run in runs]) for index, title in enumerate(titles)]
    table, indexes = at_rest
    return [
        *figures,
        _figure("table per done row, after vacuum", [table]),
        _figure("indexes per done row, after vacuum", [indexes]),
    ]


def _figure(title: str, samples: list[float]) -> Figure:
    return Figure("scale", title, "bytes", higher_is_better=False, samples={OURS: samples})


def _measure_life(bench: Bench) -> tuple[float, float, float]:
    """Returns the bytes per row of WAL, of the table and of its indexes, for the whole life of the rows."""
    bench.reset()
    batches = bench.size(4, 1)
    settings = relay_settings(bench, bench.database_url)
    rows = batches * settings.batch
    with (
        postgres.connect(bench.database_url, "bench") as connection,
        redis_connection.connect(bench.redis_url, "bench") as client,
    ):
        connection.execute("ALTER TABLE outbox SET (autovacuum_enabled = false)")
        connection.execute("CHECKPOINT")
        wal = _read_number(connection, _WAL)
        table, indexes = _read_sizes(connection)
        for number in range(rows):
            outbox.add(connection, SEND_VERIFY_EMAIL, SendVerifyEmail(username=f"user_{number}"), delay=0)
        if (handed_over := run_lifecycle(connection, client, settings, batches).rows) != rows:
            raise RuntimeError(f"{handed_over} of {rows} rows were handed over")
        wal = _read_number(connection, _WAL) - wal
        table, indexes = (
            later - before for later, before in zip(_read_sizes(connection), (table, indexes), strict=True)
        )
    return wal / rows, table / rows, indexes / rows


def bytes_at_rest(database_url: str) -> tuple[float, float]:
    """Returns the bytes per row of a vacuumed table and of its indexes."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        rows = _read_number(connection, "SELECT count(*) FROM outbox")
        table, indexes = _read_sizes(connection)
    return table / rows, indexes / rows


def _read_number(connection: psycopg.Connection[Any], statement: LiteralString) -> int:
    return _read_row(connection, statement)[0]


def _read_sizes(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    table, indexes = _read_row(connection, _SIZES)
    return table, indexes


def _read_row(connection: psycopg.Connection[Any], statement: LiteralString) -> list[int]:
    with connection.cursor(row_factory=tuple_row) as cursor:
        row = cursor.execute(statement).fetchone()
    assert row is not None
    return [int(number) for number in row]
