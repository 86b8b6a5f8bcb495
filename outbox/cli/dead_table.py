"""Dead rows as tables for people: on a terminal as wide as that, elsewhere with nothing cut."""

import sys

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from outbox.cli.dead_letters import PAYLOAD_LIMIT, ListedRow, ShownRow
from outbox.runtime.printable import printable, printable_json

_COLUMNS = {"task": 0, "error": 0, "payload": 70, "last tried": 100}
"""What a list shows besides ids and attempts, and how wide a terminal must be to have room for it beside the error."""
_UNLIMITED = 1_000_000
"""Columns of what is no terminal: nothing is cut."""


def print_list(rows: list[ListedRow]) -> None:
    """Prints a line per row of `dead.newest`. A terminal that is too narrow cuts everything but the ids."""
    console = _console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="none" if console.no_color else "bold")
    table.add_column("id", no_wrap=True, min_width=len(str(rows[0].id)))  # the newest has the longest
    table.add_column("attempts", no_wrap=True)
    for name, least_width in _COLUMNS.items():
        if console.width >= least_width:
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
        # Text is never markup. It is the cells and not the columns that say no_wrap, so that these columns give way.
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells[: len(table.columns)]))
    _print(console, table)


def print_row(row_id: int, found: ShownRow) -> None:
    """Prints all of one row of `dead.read`."""
    grid = Table.grid(padding=(0, 2))
    for label, value in {
        "row": str(row_id),
        "task": found.task,
        "queue": found.queue,
        "error": found.last_error,
        "attempts": _attempts(found),
        "created": found.created_at,
        "last tried": found.started_at,
        "by worker": found.worker,
        "request id": found.request_id,
        "unique key": found.unique_key,
        "payload": "",
    }.items():
        if value is not None:
            grid.add_row(label, Text(printable(value), overflow="fold"))
    _print(_console(), grid)
    click.echo(printable_json(found.payload))


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
