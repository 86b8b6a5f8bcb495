"""`outbox dead list` and `show` print dead rows for operators and programs."""

import io
import json
import sys

import pytest

from tests.conftest import Connection
from tests.support.dead_rows import MAX_ID, RunDead, add_dead_row, rows_by_id

HOSTILE = "\x1b]0;owned\x07\x9b2J [red]5[/red]\n\u202efdp\x7f"
"""A possible answer of a mail server: escape sequences, rich's markup, line breaks, a change of direction."""


class Terminal(io.StringIO):
    """A standard output that is a terminal."""

    def isatty(self) -> bool:
        """Returns True."""
        return True


def test_a_list_is_a_line_per_row_with_the_newest_first(connection: Connection, run_dead: RunDead) -> None:
    """A line has the id, attempts, task, error, payload and age; rows that are not dead have none."""
    first = add_dead_row(connection, last_error="550 no such user", payload='{"username": "alice"}')
    add_dead_row(connection, status="done", task="other")
    second = add_dead_row(connection, task="report", last_error=None)
    result = run_dead("list")
    assert (result.code, result.err) == (0, "")
    header, *lines = result.out.splitlines()
    assert header.split() == ["id", "attempts", "task", "error", "payload", "last", "tried"]
    assert [line.split() for line in lines] == [
        [str(second), "4/4", "report", '{"n":', "1}", "3", "h", "ago"],
        [str(first), "4/4", "send", "550", "no", "such", "user", '{"username":', '"alice"}', "3", "h", "ago"],
    ]
    assert lines == [line.rstrip() for line in lines]


def test_a_list_can_be_of_one_task(connection: Connection, run_dead: RunDead) -> None:
    """--task lists only the rows of one task, also with --json."""
    add_dead_row(connection, task="other")
    row_id = add_dead_row(connection, task="report")
    assert [line.split()[0] for line in run_dead("list", "--task", "report").out.splitlines()[1:]] == [str(row_id)]
    assert [row["id"] for row in json.loads(run_dead("list", "--task", "report", "--json").out)] == [row_id]


def test_a_list_says_how_many_rows_it_leaves_out(connection: Connection, run_dead: RunDead) -> None:
    """The sentence follows the table; with --json it is on stderr, so that stdout stays JSON."""
    row_ids = [add_dead_row(connection) for _ in range(5)]
    add_dead_row(connection, task="other")
    expected = "3 more; --limit 5 lists all\n"
    result = run_dead("list", "--limit", 2, "--task", "send")
    assert result.out.endswith(f"\n{expected}")
    assert result.err == ""
    result = run_dead("list", "--limit", 2, "--task", "send", "--json")
    assert [row["id"] for row in json.loads(result.out)] == [row_ids[4], row_ids[3]]
    assert result.err == expected
    assert "more" not in run_dead("list", "--limit", 6).out


def test_an_empty_list_says_so(connection: Connection, run_dead: RunDead) -> None:
    """It prints a sentence, or with --json an empty array, and exits with 0."""
    add_dead_row(connection, status="pending")
    assert run_dead("list") == (0, "there are no dead rows\n", "")
    assert run_dead("list", "--task", "x\x1b") == (0, "there are no dead rows of task 'x\\x1b'\n", "")
    assert run_dead("list", "--json") == (0, "[]\n", "")


def test_an_output_other_than_a_terminal_is_uncut_and_plain(
    connection: Connection, run_dead: RunDead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe or file gets whole ids, tasks and errors and no escape sequence, whatever COLUMNS is."""
    monkeypatch.setenv("COLUMNS", "40")
    connection.execute("ALTER TABLE outbox ALTER COLUMN id RESTART WITH 9223372036854775807")
    error, task = "e" * 499 + "!", "t" * 100
    assert add_dead_row(connection, task=task, last_error=error) == MAX_ID
    result = run_dead("list")
    assert len(result.out.splitlines()) == 2
    assert f"{MAX_ID}  4/4       {task}  {error}  " in result.out
    assert "\x1b" not in result.out
    assert error in run_dead("show", MAX_ID).out


@pytest.mark.parametrize("columns", [30, 40, 60, 80, 120])
def test_a_terminal_gets_a_line_per_row_that_fits(
    connection: Connection, run_dead: RunDead, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """Errors, tasks and payloads are cut to the width, and ids are not. With NO_COLOR there is no escape sequence."""
    connection.execute("ALTER TABLE outbox ALTER COLUMN id RESTART WITH 123456789")
    for _ in range(3):
        add_dead_row(connection, task="t" * 100, last_error="word " * 100, payload='{"n": "%s"}' % ("long " * 100))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in {"COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run_dead("list").code == 0
    header, *lines = terminal.getvalue().splitlines()
    assert header.startswith("id ")
    assert [line.split()[0] for line in lines] == ["123456791", "123456790", "123456789"]
    assert [line for line in [header, *lines] if len(line) > columns] == []
    assert all("…" in line for line in lines)
    assert "\x1b" not in terminal.getvalue()


@pytest.mark.parametrize("command", [["list"], ["show", "1"], ["list", "--json"], ["show", "1", "--json"]])
def test_control_characters_are_escaped(connection: Connection, run_dead: RunDead, command: list[str]) -> None:
    """Escape sequences and line breaks in an error, task or payload do not reach the terminal; markup is plain text."""
    payload = json.dumps({HOSTILE: [HOSTILE, "tag \U000e0041", "Zoë"]})
    assert add_dead_row(connection, task=f"t{HOSTILE}", last_error=HOSTILE, payload=payload) == 1
    result = run_dead(*command)
    assert result.code == 0
    assert [character for character in result.out if not character.isprintable() and character != "\n"] == []
    assert "[red]5[/red]" in result.out
    if "--json" in command:
        document = json.loads(result.out)
        (row,) = document if command[0] == "list" else [document]
        assert (row["last_error"], row["payload"]) == (HOSTILE, json.loads(payload))
    elif command == ["list"]:
        assert len(result.out.splitlines()) == 2
        assert "\\x1b]0;owned\\x07\\x9b2J [red]5[/red]\\n\\u202efdp\\x7f" in result.out
    else:
        assert json.loads(result.out.partition("payload\n")[2]) == json.loads(payload)
        assert "Zoë" in result.out


def test_a_huge_payload_is_shortened_only_in_a_list(connection: Connection, run_dead: RunDead) -> None:
    """A number with thousands of digits is neither rounded nor refused."""
    digits = "9" * 6000
    fraction = "0.10000000000000000000000000000000000001"
    row_id = add_dead_row(
        connection, payload=f'{{"huge": {digits}, "fraction": {fraction}, "text": "{"x" * 1_000_000}"}}'
    )
    (_, line) = run_dead("list").out.splitlines()
    assert "9…" in line
    assert len(line) < 200
    for command in (["show", row_id], ["show", row_id, "--json"], ["list", "--json"]):
        result = run_dead(*command)
        assert result.code == 0
        assert f'"huge": {digits}' in result.out
        assert f'"fraction": {fraction}' in result.out
        assert "x" * 1_000_000 in result.out


def test_show_prints_all_columns(connection: Connection, run_dead: RunDead) -> None:
    """It prints the columns and the payload, or with --json an object with the columns of the table."""
    row_id = add_dead_row(connection, last_error="550 no such user", payload='{"username": "alice"}')
    result = run_dead("show", row_id)
    assert (result.code, result.err) == (0, "")
    top, _, payload = result.out.partition("payload\n")
    shown = {line[:10].strip(): line[10:].strip() for line in top.splitlines()}
    assert shown.items() >= {"row": str(row_id), "task": "send", "queue": "default", "attempts": "4/4"}.items()
    assert (shown["error"], shown["by worker"]) == ("550 no such user", "w1")
    assert payload == '{\n    "username": "alice"\n}\n'
    document = json.loads(run_dead("show", row_id, "--json").out)
    assert document.keys() == rows_by_id(connection)[row_id].keys() - {"due_now"}
    assert (document["attempts"], document["last_error"]) == (4, "550 no such user")
    assert document["payload"] == {"username": "alice"}


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_show_refuses_a_row_that_is_not_dead(connection: Connection, run_dead: RunDead, arguments: list[str]) -> None:
    """The error names the status of the row, and stdout is empty."""
    row_id = add_dead_row(connection, status="done")
    assert run_dead("show", row_id, *arguments) == (1, "", f"not dead: row {row_id} is done\n")
    assert run_dead("show", MAX_ID, *arguments) == (1, "", f"not dead: row {MAX_ID} does not exist\n")
