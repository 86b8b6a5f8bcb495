"""Rows with a payload so large that a batch of them is felt: in claims, and by whoever waits behind them."""

import asyncio
from pathlib import Path

import psycopg

from tests.chaos.evidence import Run
from tests.chaos.faults import Act, Kind
from tests.chaos.handlers import TAKE_LARGE_PAYLOAD, runs_file

_ROWS = 20
_SIZE = 1_000_000
"""Bytes of text in each payload."""
_PAUSE = 0.5

# By SQL alone: none of it passes through this process on its way in. Of hex digits nothing is saved by compression.
_ADD = """
WITH noise AS MATERIALIZED (
    SELECT left(string_agg(md5(random()::text), ''), %(size)s) AS digits FROM generate_series(0, %(size)s / 32)
)
INSERT INTO outbox (task, payload)
SELECT %(task)s, jsonb_build_object('text', number || digits, 'md5', md5(number || digits))
FROM noise, generate_series(1, %(rows)s) AS number
RETURNING id
"""


async def _add_rows(act: Act) -> None:
    """Adds the rows in one transaction. Where Postgres does not say whether it did, there may be twice as many."""
    added = await _add(act)
    act.stage.large_rows += added
    act.fault.note = f"{len(added)} rows"
    await act.hold(3, 8)


async def _add(act: Act) -> list[int]:
    given = {"task": TAKE_LARGE_PAYLOAD.name, "rows": _ROWS, "size": _SIZE}
    while True:
        try:
            async with act.stage.postgres.connection() as connection:
                return [row for (row,) in await (await connection.execute(_ADD, given)).fetchall()]
        except psycopg.OperationalError:  # another fault's
            await asyncio.sleep(_PAUSE)


def read_runs(folder: Path) -> list[Run]:
    """Returns all runs of the handler, by time."""
    if not (file := runs_file(folder)).exists():
        return []
    lines = (line.split() for line in file.read_text().splitlines())
    runs = [Run(int(row), int(worker), float(at)) for row, worker, at in lines]
    return sorted(runs, key=lambda run: run.at)


KINDS = (Kind("outbox.large-rows", _add_rows),)
