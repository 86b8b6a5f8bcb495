"""Prints dead rows as tables: cut to the width of a terminal, uncut on any other output."""

import sys

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from outbox.cli.dead_letters import PAYLOAD_LIMIT, ListedRow, ShownRow
from outbox.runtime.printable import printable, printable_json

_MIN_WIDTHS = {"task": 0, "error": 0, "payload": 70, "last tried": 100}
"""The columns of a list after id and attempts, and the width in characters from which a terminal shows each."""
_UNLIMITED = 1_000_000
"""Characters; the width of an output that is not a terminal."""


def print_list(rows: list[ListedRow]) -> None:
    """Prints a line per row. A narrow terminal cuts every column but the ids."""
    console = _console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="none" if console.no_color else "bold")
    # The first row is the newest and has the longest id.
    table.add_column("id", no_wrap=True, min_width=len(str(rows[0].id)))
    table.add_column("attempts", no_wrap=True)
    for name, min_width in _MIN_WIDTHS.items():
        if console.width >= min_width:
            table.add_column(name)
    for row in rows:
        cells = [
            str(row.id),
            _attempts(row),
            printable(row.task),
            printable(row.last_error or ""),
            printable_json(_shortened(row.payload)),
            _ago(row.age),
        ]
        # Text is never markup. no_wrap is set on the cells and not on the columns, so that these columns can shrink.
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells[: len(table.columns)]))
    _print(console, table)


def print_row(row_id: int, row: ShownRow) -> None:
    """Prints one row with all its columns."""
    grid = Table.grid(padding=(0, 2))
    for label, value in {
        "row": str(row_id),
        "task": row.task,
        "queue": row.queue,
        "error": row.last_error,
        "attempts": _attempts(row),
        "created": row.created_at,
        "last tried": row.started_at,
        "by worker": row.worker,
        "request id": row.request_id,
        "unique key": row.unique_key,
        "payload": "",
    }.items():
        if value is not None:
            grid.add_row(label, Text(printable(value), overflow="fold"))
    _print(_console(), grid)
    click.echo(printable_json(row.payload))


def _attempts(row: ListedRow | ShownRow) -> str:
    return f"{row.attempts}/{row.max_retries + 1}"


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def _shortened(payload: str) -> str:
    return payload if len(payload) <= PAYLOAD_LIMIT else payload[: PAYLOAD_LIMIT - 1] + "…"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _UNLIMITED, markup=False, emoji=False, highlight=False)


def _print(console: Console, table: Table) -> None:
    with console.capture() as captured:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))
