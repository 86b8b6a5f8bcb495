"""`outbox dead`: what an operator does about rows that were given up."""

import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from outbox.cli import dead_letters, dead_table
from outbox.errors import NotDeadError, UsageError
from outbox.row import Status
from outbox.runtime import pooler, postgres
from outbox.runtime.postgres import Connection
from outbox.runtime.printable import ascii_json, printable
from outbox.runtime.settings import DatabaseSettings

_LARGEST_ID = 2**63 - 1


def _row_id(text: str) -> int:
    if re.fullmatch("[0-9]{1,19}", text) and 1 <= int(text) <= _LARGEST_ID:
        return int(text)
    shown = printable(text if len(text) <= 40 else text[:39] + "…")
    raise UsageError(f"'{shown}' is not the id of a row: that is a whole number from 1 to {_LARGEST_ID}")


def _task_name(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise UsageError(f"'{printable(value or '')}' is not a task's name: it is not UTF-8") from None
    return value


_task = click.option("--task", metavar="NAME", callback=_task_name, help="Only rows of this task.")
_as_json = click.option("--json", "as_json", is_flag=True, help="Answer in JSON, for programs.")


@click.group(short_help="List, show, retry or discard dead rows.")
def dead() -> None:
    """List, show, retry or discard the rows that were given up.

    A row is dead when it cannot succeed, or when its retries are used up. It stays until an operator decides.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # payloads hold what not every terminal can show


@dead.command("list")
@_task
@click.option("--limit", type=click.IntRange(1, 2**31 - 1), default=50, show_default=True, help="Upper bound of rows.")
@_as_json
def list_(task: str | None, limit: int, *, as_json: bool) -> None:
    """List dead rows, one per line, the newest first.

    --json prints an array of rows: objects with the columns of the table.
    """
    with _database() as connection:
        rows = [] if as_json else dead_letters.newest(connection, task, limit)
        documents = dead_letters.newest_json(connection, task, limit) if as_json else []
        shown = len(rows) + len(documents)
        more = dead_letters.count(connection, task) - shown if shown == limit else 0
    if as_json:
        click.echo("[" + ",\n".join(map(ascii_json, documents)) + "]")
    elif rows:
        dead_table.print_list(rows)
    else:
        click.echo(_none(task))
    if more > 0:
        click.echo(f"{more} more; --limit {shown + more} lists all", err=as_json)


@dead.command()
@click.argument("row", metavar="ID", type=_row_id)
@_as_json
def show(row: int, *, as_json: bool) -> None:
    """Show everything about one dead row.

    --json prints an object with the columns of the table.
    """
    with _database() as connection:
        found = dead_letters.read(connection, row)
    if found is None or found.status != Status.DEAD:
        raise _not_dead({row: found.status if found else None})
    if as_json:
        click.echo(ascii_json(found.document))
    else:
        dead_table.print_row(row, found)


@dead.command()
@click.argument("ids", metavar="[ID]...", nargs=-1, type=_row_id)
@click.option("--all", "every", is_flag=True, help="All rows that are dead now, or with --task, all of that task.")
@_task
@_as_json
def retry(ids: tuple[int, ...], task: str | None, *, every: bool, as_json: bool) -> None:
    """Make dead rows pending and due at once, with all their attempts.

    --json prints {"retried": [ids], "not_dead": [{"id": …, "status": …}]}; the status of a row that does not exist
    is null. Exit code 1 if any of the ids was not dead.
    """
    if bool(ids) == every:
        raise UsageError("say which rows to retry: either their ids, or --all")
    if task is not None and not every:
        raise UsageError("--task goes with --all: ids already say which rows")
    with _database() as connection:
        wanted = dead_letters.ids(connection, task) if every else sorted(set(ids))
        retried = dead_letters.retry(connection, wanted)
        # Rows that another operator has retried or discarded since --all looked are no mistake of this one's.
        others = {} if every else _others(connection, wanted, retried)
    if every and not retried and not as_json:
        click.echo(_none(task))
    _answer("retried", retried, others, as_json=as_json)


@dead.command()
@click.argument("ids", metavar="ID...", nargs=-1, type=_row_id)
@_as_json
def discard(ids: tuple[int, ...], *, as_json: bool) -> None:
    """Delete dead rows permanently, without asking.

    --json prints {"discarded": [ids], "not_dead": [{"id": …, "status": …}]}; the status of a row that does not exist
    is null. Exit code 1 if any of the ids was not dead.
    """
    if not ids:
        raise UsageError("say which rows to discard: their ids")
    with _database() as connection:
        wanted = sorted(set(ids))
        discarded = dead_letters.discard(connection, wanted)
        others = _others(connection, wanted, discarded)
    _answer("discarded", discarded, others, as_json=as_json)


@dead.command("give-up")
@click.option("--all", "every", is_flag=True, help="The rows of all tasks that no worker can handle.")
@_task
@_as_json
def give_up(task: str | None, *, every: bool, as_json: bool) -> None:
    """Make rows dead that no worker can handle.

    Without this command they are dead after OUTBOX_UNHANDLED_GRACE. Workers give back a row if they do not know its
    task or if its payload does not fit their model: another worker may handle it. Skips a row that a worker holds at
    this moment. --json prints {"given_up": [ids]}.
    """
    if (task is not None) == every:
        raise UsageError("say which rows to give up: those of one --task, or --all")
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
        postgres.check_migrated(connection)
        yield connection


def _others(connection: Connection, wanted: list[int], done: list[int]) -> dict[int, str | None]:
    left = sorted(set(wanted) - set(done))
    return dead_letters.statuses(connection, left) if left else {}


def _answer(verb: str, done: list[int], others: dict[int, str | None], *, as_json: bool) -> None:
    if as_json:
        not_dead = [{"id": row, "status": status} for row, status in others.items()]
        click.echo(json.dumps({verb: done, "not_dead": not_dead}))
    elif done:
        click.echo(f"{verb} {_rows(len(done))}")
    if others:
        raise _not_dead(others)


def _not_dead(others: dict[int, str | None]) -> NotDeadError:
    each = (f"row {row} is {status}" if status else f"row {row} does not exist" for row, status in others.items())
    return NotDeadError(f"not dead: {', '.join(each)}")


def _none(task: str | None) -> str:
    return "there are no dead rows" if task is None else f"there are no dead rows of task '{printable(task)}'"


def _rows(number: int) -> str:
    return f"{number} dead row{'' if number == 1 else 's'}"
