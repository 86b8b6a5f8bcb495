"""Injects rows with payloads so large that a batch of them slows down claims and the rows behind them."""

import asyncio
from pathlib import Path

import psycopg

from tests.chaos.evidence import HandlerRun
from tests.chaos.faults import Injection, Kind
from tests.chaos.handlers import TAKE_LARGE_PAYLOAD, runs_file

_ROWS = 20
_SIZE = 1_000_000
"""Bytes of text in each payload."""
_PAUSE = 0.5

# In SQL, so that no payload passes through this process on its way in. Random hex digits do not compress.
_ADD = """
WITH noise AS MATERIALIZED (
    SELECT left(string_agg(md5(random()::text), ''), %(size)s) AS digits FROM generate_series(0, %(size)s / 32)
)
INSERT INTO outbox (task, payload)
SELECT %(task)s, jsonb_build_object('text', number || digits, 'md5', md5(number || digits))
FROM noise, generate_series(1, %(rows)s) AS number
RETURNING id
"""


async def _add_rows(injection: Injection) -> None:
    """Adds the rows in one transaction; twice if the answer to a commit is lost."""
    added = await _add(injection)
    injection.system.large_rows += added
    injection.fault.note = f"{len(added)} rows"
    await injection.hold(3, 8)


async def _add(injection: Injection) -> list[int]:
    parameters = {"task": TAKE_LARGE_PAYLOAD.name, "rows": _ROWS, "size": _SIZE}
    while True:
        try:
            async with injection.system.postgres.connection() as connection:
                return [row for (row,) in await (await connection.execute(_ADD, parameters)).fetchall()]
        except psycopg.OperationalError:  # another fault affects Postgres
            await asyncio.sleep(_PAUSE)


def read_runs(folder: Path) -> list[HandlerRun]:
    """Returns all runs of the handler, sorted by time."""
    if not (file := runs_file(folder)).exists():
        return []
    lines = (line.split() for line in file.read_text().splitlines())
    runs = [HandlerRun(int(row), int(worker), float(at)) for row, worker, at in lines]
    return sorted(runs, key=lambda run: run.at)


KINDS = (Kind("outbox.large-rows", _add_rows),)
