"""`outbox dead` reports errors in a sentence on stderr and an exit code."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.conftest import Connection
from tests.support.dead_rows import RunDead, add_dead_row, rows_by_id


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["retry"], "name the rows to retry: either their ids, or --all"),
        (["retry", "1", "--all"], "name the rows to retry: either their ids, or --all"),
        (["retry", "1", "--task", "send"], "--task needs --all"),
        (["retry", "--task", "send"], "name the rows to retry: either their ids, or --all"),
        (["retry", "1", "x\x1b"], "'x\\x1b' is not the id of a row: an id is a whole number from 1 to"),
        (["retry", "1", "1.0"], "'1.0' is not the id of a row"),
        (["retry", "1", "\u0661"], "'\u0661' is not the id of a row"),
        (["retry", "1", "--", "-1"], "'-1' is not the id of a row"),
        (["give-up"], "name the rows to give up: either --task, or --all"),
        (["give-up", "--all", "--task", "send"], "name the rows to give up: either --task, or --all"),
        (["discard"], "name the rows to discard: their ids"),
        (["discard", "1", str(2**63)], "'9223372036854775808' is not the id of a row"),
        (["discard", "1", "9" * 5000], f"'{'9' * 39}…' is not the id of a row"),
        (["discard", "1", "0"], "'0' is not the id of a row"),
        (["show", ""], "'' is not the id of a row"),
        (["list", "--task", "\udcff"], "'\\udcff' is not the name of a task"),
    ],
)
def test_wrong_arguments_do_nothing(
    connection: Connection, run_dead: RunDead, arguments: list[str], sentence: str
) -> None:
    """The error is one sentence, the exit code is 2, and no row changes."""
    assert add_dead_row(connection) == 1
    before = rows_by_id(connection)
    result = run_dead(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(sentence)
    assert result.err.count("\n") == 1
    assert rows_by_id(connection) == before


@pytest.mark.parametrize("command", [["list"], ["show", "1"], ["retry", "--all"], ["discard", "1"]])
def test_an_unusable_database_is_reported_in_a_sentence(
    run_dead: RunDead,
    create_database: Callable[[str | None], str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    """The sentence for a database that is not migrated, unavailable or not named has no traceback and no password."""
    monkeypatch.setenv("DATABASE_URL", create_database(None))
    result = run_dead(*command)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("the database is not migrated")
    monkeypatch.setenv("DATABASE_URL", "postgresql://outbox:hunter2@127.0.0.1:1/outbox")
    result = run_dead(*command)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("Postgres is away or refuses: ")
    assert "hunter2" not in result.err
    monkeypatch.delenv("DATABASE_URL")
    result = run_dead(*command)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("DATABASE_URL is not set: ")


def test_an_output_that_is_not_utf_8(connection: Connection, database_url: str) -> None:
    """Characters that the output of a real process cannot encode are escaped."""
    row_id = add_dead_row(connection, payload='{"name": "Zoë \N{GRINNING FACE}"}', last_error="\u2603")
    environment = {**os.environ, "DATABASE_URL": database_url, "PYTHONIOENCODING": "latin-1"}

    def run(*arguments: str) -> tuple[int, bytes, bytes]:
        command = [sys.executable, "-m", "outbox", "dead", *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, timeout=30, check=False)
        return result.returncode, result.stdout, result.stderr

    code, out, err = run("show", str(row_id))
    assert (code, err) == (0, b"")
    assert b"error       \\u2603\n" in out
    assert '"name": "Zoë '.encode("latin-1") + b'\\U0001f600"' in out
    assert run("retry", str(row_id), "99") == (1, b"retried 1 dead row\n", b"not dead: row 99 does not exist\n")
