"""`outbox dead`: the commands for rows that were given up."""

import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import click

from outbox.cli import dead_letters, dead_table
from outbox.errors import NotDeadError, UsageError
from outbox.row import Status
from outbox.runtime import pooler, schema
from outbox.runtime.postgres import Connection
from outbox.runtime.printable import ascii_json, printable
from outbox.runtime.settings import DatabaseSettings

_MAX_ID = 2**63 - 1


def _row_id(text: str) -> int:
    if re.fullmatch("[0-9]{1,19}", text) and 1 <= int(text) <= _MAX_ID:
        return int(text)
    shown = printable(text if len(text) <= 40 else text[:39] + "…")
    raise UsageError(f"'{shown}' is not the id of a row: an id is a whole number from 1 to {_MAX_ID}")


def _task_name(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise UsageError(f"'{printable(value or '')}' is not the name of a task: it is not UTF-8") from None
    return value


_task = click.option("--task", metavar="NAME", callback=_task_name, help="Only rows of this task.")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group(short_help="List, show, retry or discard dead rows.")
def dead() -> None:
    """List, show, retry or discard dead rows.

    A row is dead when it cannot succeed, or when its retries are used up. It stays until an operator decides.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a payload may hold characters that the output cannot encode


@dead.command("list")
@_task
@click.option(
    "--limit", type=click.IntRange(1, 2**31 - 1), default=50, show_default=True, help="Maximum number of rows."
)
@_as_json
def list_(task: str | None, limit: int, *, as_json: bool) -> None:
    """List dead rows, one per line, the newest first.

    --json prints an array of rows: objects with the columns of the table.
    """
    with _database() as connection:
        rows = [] if as_json else dead_letters.newest(connection, task, limit)
        documents = dead_letters.newest_json(connection, task, limit) if as_json else []
        listed = len(rows) + len(documents)
        more = dead_letters.count(connection, task) - listed if listed == limit else 0
    if as_json:
        click.echo("[" + ",\n".join(map(ascii_json, documents)) + "]")
    elif rows:
        dead_table.print_list(rows)
    else:
        click.echo(_no_rows(task))
    if more > 0:
        click.echo(f"{more} more; --limit {listed + more} lists all", err=as_json)


@dead.command()
@click.argument("row_id", metavar="ID", type=_row_id)
@_as_json
def show(row_id: int, *, as_json: bool) -> None:
    """Show everything about one dead row.

    --json prints an object with the columns of the table.
    """
    with _database() as connection:
        row = dead_letters.read(connection, row_id)
    if row is None or row.status != Status.DEAD:
        raise _not_dead({row_id: row.status if row else None})
    if as_json:
        click.echo(ascii_json(row.document))
    else:
        dead_table.print_row(row_id, row)


@dead.command()
@click.argument("row_ids", metavar="[ID]...", nargs=-1, type=_row_id)
@click.option("--all", "is_all", is_flag=True, help="All dead rows; with --task, all dead rows of that task.")
@_task
@_as_json
def retry(row_ids: tuple[int, ...], task: str | None, *, is_all: bool, as_json: bool) -> None:
    """Make dead rows pending, with all their attempts.

    They are due at once, or some seconds later if the worker of the last attempt is still stopping.

    --json prints {"retried": [ids], "not_dead": [{"id": …, "status": …}]}; the status of a row that does not exist
    is null. The exit code is 1 if a row was not dead.
    """
    if bool(row_ids) == is_all:
        raise UsageError("name the rows to retry: either their ids, or --all")
    if task is not None and not is_all:
        raise UsageError("--task needs --all: it cannot be combined with ids")
    with _database() as connection:
        requested = dead_letters.ids(connection, task) if is_all else sorted(set(row_ids))
        retried = dead_letters.retry(connection, requested)
        # With --all, a row that another operator has retried or discarded in the meantime is no error.
        not_dead = {} if is_all else _statuses_of_rest(connection, requested, retried)
    if is_all and not retried and not as_json:
        click.echo(_no_rows(task))
    _report("retried", retried, not_dead, as_json=as_json)


@dead.command()
@click.argument("row_ids", metavar="ID...", nargs=-1, type=_row_id)
@_as_json
def discard(row_ids: tuple[int, ...], *, as_json: bool) -> None:
    """Delete dead rows permanently, without asking.

    --json prints {"discarded": [ids], "not_dead": [{"id": …, "status": …}]}; the status of a row that does not exist
    is null. The exit code is 1 if a row was not dead.
    """
    if not row_ids:
        raise UsageError("name the rows to discard: their ids")
    with _database() as connection:
        requested = sorted(set(row_ids))
        discarded = dead_letters.discard(connection, requested)
        not_dead = _statuses_of_rest(connection, requested, discarded)
    _report("discarded", discarded, not_dead, as_json=as_json)


@dead.command("give-up")
@click.option("--all", "is_all", is_flag=True, help="Rows of all tasks that no worker can handle.")
@_task
@_as_json
def give_up(task: str | None, *, is_all: bool, as_json: bool) -> None:
    """Make rows dead that no worker can handle.

    Without this command they are dead after OUTBOX_UNHANDLED_GRACE. A worker gives back a row if it does not know the
    task or if the payload does not fit its model, because another worker may handle the row. Skips a row that a worker
    holds at this moment. --json prints {"given_up": [ids]}.
    """
    if (task is not None) == is_all:
        raise UsageError("name the rows to give up: either --task, or --all")
    with _database() as connection:
        given_up = dead_letters.give_up(connection, dead_letters.unhandled_ids(connection, task))
    if as_json:
        click.echo(json.dumps({"given_up": given_up}))
    else:
        of_task = "" if task is None else f" of task '{printable(task)}'"
        click.echo(f"gave up {len(given_up)} row{'' if len(given_up) == 1 else 's'}{of_task}")


@contextmanager
def _database() -> Iterator[Connection]:
    settings = DatabaseSettings.from_environment()
    with pooler.connect_checked(
        settings.database_url, "outbox dead", pooled=settings.transaction_pooling
    ) as connection:
        schema.check_migrated(connection)
        yield connection


def _statuses_of_rest(connection: Connection, requested: list[int], changed: list[int]) -> dict[int, Status | None]:
    """Returns the statuses of the requested rows that were not changed; None for a row that does not exist."""
    rest = sorted(set(requested) - set(changed))
    return dead_letters.statuses(connection, rest) if rest else {}


def _report(verb: str, changed: list[int], not_dead: Mapping[int, Status | None], *, as_json: bool) -> None:
    if as_json:
        others = [{"id": row_id, "status": status} for row_id, status in not_dead.items()]
        click.echo(json.dumps({verb: changed, "not_dead": others}))
    elif changed:
        click.echo(f"{verb} {len(changed)} dead row{'' if len(changed) == 1 else 's'}")
    if not_dead:
        raise _not_dead(not_dead)


def _not_dead(statuses: Mapping[int, Status | None]) -> NotDeadError:
    clauses = (
        f"row {row_id} is {status}" if status else f"row {row_id} does not exist" for row_id, status in statuses.items()
    )
    return NotDeadError(f"not dead: {', '.join(clauses)}")


def _no_rows(task: str | None) -> str:
    return "there are no dead rows" if task is None else f"there are no dead rows of task '{printable(task)}'"
