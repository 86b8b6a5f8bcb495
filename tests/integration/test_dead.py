"""`outbox dead`: what operators and programs see of dead rows, and what they can do about them."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest

from outbox.cli import dead_letters
from outbox.cli.commands import outbox
from outbox.queries import query
from outbox.rq_jobs import Delivery
from outbox.runtime import postgres, process
from outbox_worker.claim import claim
from tests.conftest import Connection
from tests.support.waiting import eventually

LARGEST = 2**63 - 1
HOSTILE = "\x1b]0;owned\x07\x9b2J [red]5[/red]\n\u202efdp\x7f"
"""What a mail server might answer: escape sequences, rich's markup, line breaks, a change of direction."""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Terminal(io.StringIO):
    """A standard output that is a terminal."""

    def isatty(self) -> bool:
        """Says so."""
        return True


Run = Callable[..., Ended]


@pytest.fixture
def run(database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `outbox dead …` as the process does, exit code and all, but inside this one."""
    monkeypatch.setenv("DATABASE_URL", database_url)

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            process.run(lambda: outbox.main(["dead", *map(str, arguments)], prog_name="outbox"))
        code = ended.value.code
        assert isinstance(code, int)
        return Ended(code, *capsys.readouterr())

    return run


def add_row(connection: Connection, **columns: Any) -> int:
    """Adds a row, dead after 4 attempts and 3 deliveries unless told otherwise, and returns its id."""
    row = connection.execute(
        "INSERT INTO outbox (task, payload, status, delivery, attempts, max_retries, run_at, worker, last_error,"
        " started_at, lease_until, done_at) VALUES (%(task)s, %(payload)s, %(status)s, 3, 4, 3,"
        " now() - interval '1 day', 'w1', %(last_error)s, now() - interval '3 h 5 min',"
        " CASE WHEN %(status)s = 'running' THEN now() END, CASE WHEN %(status)s = 'done' THEN now() END) RETURNING id",
        {"task": "send", "payload": '{"n": 1}', "status": "dead", "last_error": "no", **columns},
    ).fetchone()
    assert row is not None
    return int(row["id"])


def all_rows(connection: Connection) -> dict[int, dict[str, Any]]:
    """Returns every row by its id."""
    found = connection.execute("SELECT *, run_at BETWEEN now() - interval '1 min' AND now() AS due_now FROM outbox")
    return {row["id"]: row for row in found}


def status_of(connection: Connection, row: int) -> str | None:
    """Returns what a row is, or None if it is gone."""
    found = connection.execute("SELECT status FROM outbox WHERE id = %s", [row]).fetchone()
    return found["status"] if found else None


# --- list


def test_a_list_is_a_line_per_row_with_the_newest_first(connection: Connection, run: Run) -> None:
    """Id, attempts of how many, task, error, payload, and since when; nothing of rows that are not dead."""
    first = add_row(connection, last_error="550 no such user", payload='{"username": "alice"}')
    add_row(connection, status="done", task="other")
    second = add_row(connection, task="report", last_error=None)
    ended = run("list")
    assert (ended.code, ended.err) == (0, "")
    header, *lines = ended.out.splitlines()
    assert header.split() == ["id", "attempts", "task", "error", "payload", "last", "tried"]
    assert [line.split() for line in lines] == [
        [str(second), "4/4", "report", '{"n":', "1}", "3", "h", "ago"],
        [str(first), "4/4", "send", "550", "no", "such", "user", '{"username":', '"alice"}', "3", "h", "ago"],
    ]
    assert lines == [line.rstrip() for line in lines]


def test_a_list_can_be_of_one_task(connection: Connection, run: Run) -> None:
    """--task leaves out the others, for people and for programs."""
    add_row(connection, task="other")
    row = add_row(connection, task="report")
    assert [line.split()[0] for line in run("list", "--task", "report").out.splitlines()[1:]] == [str(row)]
    assert [one["id"] for one in json.loads(run("list", "--task", "report", "--json").out)] == [row]


def test_a_list_says_how_many_rows_it_leaves_out(connection: Connection, run: Run) -> None:
    """Under the table, or beside the JSON on stderr, so that a program's input stays JSON."""
    rows = [add_row(connection) for _ in range(5)]
    add_row(connection, task="other")
    told = "3 more; --limit 5 lists all\n"
    ended = run("list", "--limit", 2, "--task", "send")
    assert ended.out.endswith(f"\n{told}")
    assert ended.err == ""
    ended = run("list", "--limit", 2, "--task", "send", "--json")
    assert [one["id"] for one in json.loads(ended.out)] == [rows[4], rows[3]]
    assert ended.err == told
    assert "more" not in run("list", "--limit", 6).out


def test_an_empty_list_says_so(connection: Connection, run: Run) -> None:
    """A sentence for people, an empty array for programs, and no error."""
    add_row(connection, status="pending")
    assert run("list") == (0, "there are no dead rows\n", "")
    assert run("list", "--task", "x\x1b") == (0, "there are no dead rows of task 'x\\x1b'\n", "")
    assert run("list", "--json") == (0, "[]\n", "")


def test_what_is_no_terminal_gets_the_whole_error_and_no_colours(
    connection: Connection, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe or a file gets ids, tasks and errors uncut, however wide, and no escape sequence."""
    monkeypatch.setenv("COLUMNS", "40")
    connection.execute("ALTER TABLE outbox ALTER COLUMN id RESTART WITH 9223372036854775807")
    error, task = "e" * 499 + "!", "t" * 100
    assert add_row(connection, task=task, last_error=error) == LARGEST
    ended = run("list")
    assert len(ended.out.splitlines()) == 2
    assert f"{LARGEST}  4/4       {task}  {error}  " in ended.out
    assert "\x1b" not in ended.out
    assert error in run("show", LARGEST).out


@pytest.mark.parametrize("columns", [30, 40, 60, 80, 120])
def test_a_terminal_gets_a_line_per_row_that_fits(
    connection: Connection, run: Run, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """Errors, tasks and payloads are cut to the width; ids are not. NO_COLOR leaves no escape sequence."""
    connection.execute("ALTER TABLE outbox ALTER COLUMN id RESTART WITH 123456789")
    for _ in range(3):
        add_row(connection, task="t" * 100, last_error="word " * 100, payload='{"n": "%s"}' % ("long " * 100))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in {"COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run("list").code == 0
    header, *lines = terminal.getvalue().splitlines()
    assert header.startswith("id ")
    assert [line.split()[0] for line in lines] == ["123456791", "123456790", "123456789"]
    assert [line for line in [header, *lines] if len(line) > columns] == []
    assert all("…" in line for line in lines)
    assert "\x1b" not in terminal.getvalue()


@pytest.mark.parametrize("command", [["list"], ["show", "1"], ["list", "--json"], ["show", "1", "--json"]])
def test_foreign_text_commands_no_terminal(connection: Connection, run: Run, command: list[str]) -> None:
    """Escape sequences, line breaks and markup in an error, a task or a payload are printed as what they are."""
    payload = json.dumps({HOSTILE: [HOSTILE, "tag \U000e0041", "Zoë"]})
    assert add_row(connection, task=f"t{HOSTILE}", last_error=HOSTILE, payload=payload) == 1
    ended = run(*command)
    assert ended.code == 0
    assert [character for character in ended.out if not character.isprintable() and character != "\n"] == []
    assert "[red]5[/red]" in ended.out
    if "--json" in command:
        document = json.loads(ended.out)
        (row,) = document if command[0] == "list" else [document]
        assert (row["last_error"], row["payload"]) == (HOSTILE, json.loads(payload))
    elif command == ["list"]:
        assert len(ended.out.splitlines()) == 2
        assert "\\x1b]0;owned\\x07\\x9b2J [red]5[/red]\\n\\u202efdp\\x7f" in ended.out
    else:
        assert json.loads(ended.out.partition("payload\n")[2]) == json.loads(payload)
        assert "Zoë" in ended.out


def test_a_huge_payload_is_short_in_a_list_and_whole_elsewhere(connection: Connection, run: Run) -> None:
    """No number is rounded or refused, however many digits it has."""
    digits = "9" * 6000
    fraction = "0.10000000000000000000000000000000000001"
    row = add_row(connection, payload=f'{{"huge": {digits}, "fraction": {fraction}, "text": "{"x" * 1_000_000}"}}')
    (_, line) = run("list").out.splitlines()
    assert "9…" in line
    assert len(line) < 200
    for command in (["show", row], ["show", row, "--json"], ["list", "--json"]):
        ended = run(*command)
        assert ended.code == 0
        assert f'"huge": {digits}' in ended.out
        assert f'"fraction": {fraction}' in ended.out
        assert "x" * 1_000_000 in ended.out


# --- show


def test_show_prints_all_of_a_row(connection: Connection, run: Run) -> None:
    """Error, attempts, times and the payload for people; an object with the table's columns for programs."""
    row = add_row(connection, last_error="550 no such user", payload='{"username": "alice"}')
    ended = run("show", row)
    assert (ended.code, ended.err) == (0, "")
    top, _, payload = ended.out.partition("payload\n")
    shown = {line[:10].strip(): line[10:].strip() for line in top.splitlines()}
    assert shown.items() >= {"row": str(row), "task": "send", "queue": "default", "attempts": "4/4"}.items()
    assert (shown["error"], shown["by worker"]) == ("550 no such user", "w1")
    assert payload == '{\n    "username": "alice"\n}\n'
    document = json.loads(run("show", row, "--json").out)
    assert document.keys() == all_rows(connection)[row].keys() - {"due_now"}
    assert (document["attempts"], document["last_error"]) == (4, "550 no such user")
    assert document["payload"] == {"username": "alice"}


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_show_of_what_is_not_dead_is_a_sentence(connection: Connection, run: Run, arguments: list[str]) -> None:
    """It says what the row is; nothing is printed for a program to take for a dead row."""
    row = add_row(connection, status="done")
    assert run("show", row, *arguments) == (1, "", f"not dead: row {row} is done\n")
    assert run("show", LARGEST, *arguments) == (1, "", f"not dead: row {LARGEST} does not exist\n")


# --- retry


def test_a_retried_row_starts_afresh(connection: Connection, run: Run) -> None:
    """It is pending, due now, without attempts; its delivery goes on counting and its last error stays readable."""
    row, other = add_row(connection), add_row(connection)
    before = all_rows(connection)
    assert run("retry", row) == (0, "retried 1 dead row\n", "")
    after = all_rows(connection)
    fresh = {"status": "pending", "attempts": 0, "worker": None, "due_now": True, "run_at": after[row]["run_at"]}
    assert after[row] == {**before[row], **fresh}
    assert after[other] == before[other]


def test_a_retried_row_is_handed_over_and_claimed_as_a_new_one(connection: Connection, run: Run) -> None:
    """The relay gets it with its next delivery; a job from before its death claims nothing, and the count is 1."""
    row = add_row(connection)
    run("retry", row)
    parameters = {"queue": "default", "window": 100, "horizon": 0.0, "batch": 10, "room": None}
    parameters |= {"payload_limit": 9, "left_out": []}
    (published,) = connection.execute(query("publish"), parameters).fetchall()
    assert (published["id"], published["delivery"], published["scheduled"]) == (row, 4, False)
    assert claim(connection, [Delivery(row, 3)], "w2", 15) == []
    (claimed,) = claim(connection, [Delivery(row, 4)], "w2", 15)
    assert (claimed.attempt, claimed.max_retries) == (1, 3)
    assert all_rows(connection)[row]["attempts"] == 1


def test_a_retry_wakes_the_relays_after_its_commit(connection: Connection, run: Run) -> None:
    """Who hears the hint sees the row; a retry of nothing wakes nobody."""
    row, done = add_row(connection), add_row(connection, status="done")
    connection.execute(query("listen"))
    run("retry", done)
    assert list(connection.notifies(timeout=0.2)) == []
    run("retry", row)
    assert len(list(connection.notifies(timeout=10, stop_after=1))) == 1
    assert status_of(connection, row) == "pending"


@pytest.mark.parametrize(("verb", "becomes"), [("retry", "pending"), ("discard", None)])
def test_ids_that_are_not_dead_are_told_and_the_others_done(
    connection: Connection, run: Run, verb: str, becomes: str | None
) -> None:
    """One sentence names each and what it is, exit code 1; such rows stay as they are, and an id may be said twice."""
    dead_rows = [add_row(connection), add_row(connection)]
    others = {add_row(connection, status=status): status for status in ("pending", "enqueued", "running", "done")}
    before = all_rows(connection)
    ended = run(verb, *others, *dead_rows, LARGEST, dead_rows[0])
    told = ", ".join(f"row {row} is {status}" for row, status in others.items())
    done = {"retry": "retried", "discard": "discarded"}[verb]
    assert ended == (1, f"{done} 2 dead rows\n", f"not dead: {told}, row {LARGEST} does not exist\n")
    assert [status_of(connection, row) for row in dead_rows] == [becomes] * 2
    after = all_rows(connection)
    assert {row: after[row] for row in others} == {row: before[row] for row in others}

    again = add_row(connection)
    ended = run(verb, LARGEST, again, *list(others)[:1], "--json")
    assert ended.code == 1
    assert json.loads(ended.out) == {
        done: [again],
        "not_dead": [{"id": next(iter(others)), "status": "pending"}, {"id": LARGEST, "status": None}],
    }
    assert run(verb, LARGEST) == (1, "", f"not dead: row {LARGEST} does not exist\n")


def test_retry_all_takes_every_dead_row_or_those_of_a_task(
    connection: Connection, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In as many batches as it takes; without any it says so, and that is no error."""
    monkeypatch.setattr(dead_letters, "BATCH", 2)
    done = add_row(connection, status="done")
    rows = [add_row(connection) for _ in range(5)]
    others = [add_row(connection, task="other") for _ in range(3)]
    assert run("retry", "--all", "--task", "send") == (0, "retried 5 dead rows\n", "")
    assert {status_of(connection, row) for row in rows} == {"pending"}
    assert {status_of(connection, row) for row in others} == {"dead"}
    assert run("retry", "--all", "--task", "send") == (0, "there are no dead rows of task 'send'\n", "")
    ended = run("retry", "--all", "--json")
    assert (ended.code, json.loads(ended.out)) == (0, {"retried": others, "not_dead": []})
    assert run("retry", "--all") == (0, "there are no dead rows\n", "")
    ended = run("retry", "--all", "--json")
    assert (ended.code, json.loads(ended.out)) == (0, {"retried": [], "not_dead": []})
    assert status_of(connection, done) == "done"


def test_a_row_that_two_operators_retry_is_retried_once(connection: Connection, database_url: str) -> None:
    """The second waits for the first and then finds a row that is dead no more."""
    row = add_row(connection)
    with (
        postgres.connect(database_url, "first") as first,
        postgres.connect(database_url, "second") as second,
        ThreadPoolExecutor(1) as thread,
    ):
        with first.transaction():
            assert dead_letters.retry(first, [row]) == [row]
            waiting = thread.submit(dead_letters.retry, second, [row])
            _waits_for_a_lock(connection, "second")
        assert waiting.result(10) == []


@pytest.mark.parametrize(("command", "becomes"), [(dead_letters.retry, "pending"), (dead_letters.discard, None)])
def test_many_rows_are_locked_a_batch_at_a_time(
    connection: Connection,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[[Connection, list[int]], list[int]],
    becomes: str | None,
) -> None:
    """While the last batch still waits for somebody's lock, the ones before it are committed."""
    monkeypatch.setattr(dead_letters, "BATCH", 2)
    rows = [add_row(connection) for _ in range(5)]
    with (
        postgres.connect(database_url, "other") as other,
        postgres.connect(database_url, "operator") as own,
        ThreadPoolExecutor(1) as thread,
    ):
        with other.transaction():
            other.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", [rows[4]])
            done = thread.submit(command, own, rows)
            _waits_for_a_lock(connection, "operator")
            assert [status_of(connection, row) for row in rows] == [becomes] * 4 + ["dead"]
        assert done.result(10) == rows


def _waits_for_a_lock(connection: Connection, name: str) -> None:
    eventually(
        lambda: connection.execute(
            "SELECT FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock'", [name]
        ).fetchall(),
        what=f"{name} waits for a lock",
    )


# --- give up


def test_rows_that_no_worker_can_handle_are_given_up(
    connection: Connection, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a task, or all; rows that workers handle are left alone, and so is one that a worker holds."""
    monkeypatch.setattr(dead_letters, "BATCH", 2)
    statuses = ["pending", "pending", "enqueued", "running"]
    rows = [add_row(connection, task="new", status=status, last_error="no handler") for status in statuses]
    other = add_row(connection, task="other", status="pending")
    connection.execute("UPDATE outbox SET unhandled_since = now()")
    handled = add_row(connection, task="new", status="pending")
    assert run("give-up", "--task", "new\x1b") == (0, "gave up 0 rows of task 'new\\x1b'\n", "")
    assert run("give-up", "--task", "new") == (0, "gave up 3 rows of task 'new'\n", "")
    found = all_rows(connection)
    assert [found[row]["status"] for row in rows] == ["dead", "dead", "dead", "running"]
    assert found[rows[0]]["last_error"] == "no handler"
    assert (found[other]["status"], found[handled]["status"]) == ("pending", "pending")
    ended = run("give-up", "--all", "--json")
    assert (ended.code, json.loads(ended.out)) == (0, {"given_up": [other]})
    assert run("retry", rows[0]).code == 0
    assert run("give-up", "--all").out == "gave up 0 rows\n", "what was retried is not yet back from a worker"


# --- discard


def test_a_discarded_row_is_gone(connection: Connection, run: Run) -> None:
    """At once and without a question: its id was given. The others stay."""
    row, other = add_row(connection), add_row(connection)
    assert run("discard", row) == (0, "discarded 1 dead row\n", "")
    assert list(all_rows(connection)) == [other]
    ended = run("discard", other, "--json")
    assert (ended.code, json.loads(ended.out)) == (0, {"discarded": [other], "not_dead": []})


# --- mistakes


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
def test_wrong_arguments_do_nothing(connection: Connection, run: Run, arguments: list[str], sentence: str) -> None:
    """One sentence that says what is wrong, exit code 2, and the rows that were named rightly stay dead."""
    assert add_row(connection) == 1
    before = all_rows(connection)
    ended = run(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(sentence)
    assert ended.err.count("\n") == 1
    assert all_rows(connection) == before


@pytest.mark.parametrize("command", [["list"], ["show", "1"], ["retry", "--all"], ["discard", "1"]])
def test_a_database_that_cannot_serve_is_a_sentence(
    run: Run,
    create_database: Callable[[str | None], str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    """Not migrated, away, or not named: what every other command says, without a traceback or the password."""
    monkeypatch.setenv("DATABASE_URL", create_database(None))
    ended = run(*command)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("the database is not migrated")
    monkeypatch.setenv("DATABASE_URL", "postgresql://outbox:hunter2@127.0.0.1:1/outbox")
    ended = run(*command)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("Postgres is away or refuses: ")
    assert "hunter2" not in ended.err
    monkeypatch.delenv("DATABASE_URL")
    ended = run(*command)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("DATABASE_URL is not set: ")


def test_the_command_itself_on_an_output_that_is_not_utf_8(connection: Connection, database_url: str) -> None:
    """As a real process: what the output cannot encode is escaped, and an exit code is the process' own."""
    row = add_row(connection, payload='{"name": "Zoë \N{GRINNING FACE}"}', last_error="\u2603")
    environment = {**os.environ, "DATABASE_URL": database_url, "PYTHONIOENCODING": "latin-1"}

    def run(*arguments: str) -> tuple[int, bytes, bytes]:
        command = [sys.executable, "-m", "outbox", "dead", *arguments]
        ended = subprocess.run(command, env=environment, capture_output=True, timeout=30, check=False)
        return ended.returncode, ended.stdout, ended.stderr

    code, out, err = run("show", str(row))
    assert (code, err) == (0, b"")
    assert b"error       \\u2603\n" in out
    assert '"name": "Zoë '.encode("latin-1") + b'\\U0001f600"' in out
    assert run("retry", str(row), "99") == (1, b"retried 1 dead row\n", b"not dead: row 99 does not exist\n")
