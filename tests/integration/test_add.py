"""Adding a row to the outbox in the caller's transaction."""

import asyncio
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection
from psycopg.rows import dict_row
from pydantic import BaseModel

import outbox
from outbox.signup.send_verify_email import SEND_VERIFY_EMAIL, SendVerifyEmail

Connection = psycopg.Connection[dict[str, Any]]
ALICE = SendVerifyEmail(username="alice")
_UNCHECKED = SendVerifyEmail.model_construct()  # type: ignore[call-arg]


class Report(BaseModel):
    """The payload of this module's task."""

    month: int
    notes: dict[str, Any] = {}


REPORT = outbox.Task("report", Report, delay=5, max_retries=3, timeout=60)


def _rows(connection: Connection) -> list[dict[str, Any]]:
    return connection.execute(
        "SELECT *, extract(epoch FROM run_at - created_at)::float8 AS delay FROM outbox ORDER BY id"
    ).fetchall()


def _add_user(connection: Connection) -> None:
    connection.execute("INSERT INTO users VALUES ('alice', 'hash', 'Alice A', 'alice@example.com')")


def test_a_row_commits_with_the_change_it_belongs_to(connection: Connection, database_url: str) -> None:
    """Other sessions see the row only after the caller's commit."""
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as other:
        with connection.transaction():
            _add_user(connection)
            added = outbox.add(connection, SEND_VERIFY_EMAIL, ALICE, request_id="r1")
            assert _rows(other) == []
        (row,) = _rows(other)
    assert added == row["id"]
    assert (row["task"], row["payload"], row["queue"], row["status"]) == (
        "send_verify_email",
        {"username": "alice"},
        "critical",
        "pending",
    )
    assert (row["delay"], row["max_retries"], row["timeout"], row["request_id"]) == (10, 10, 30, "r1")
    assert (row["delivery"], row["attempts"], row["unique_key"]) == (0, 0, None)


def test_a_row_rolls_back_with_the_change_it_belongs_to(connection: Connection) -> None:
    """If the caller fails after adding, neither the change nor the row remains."""

    def change() -> None:
        with connection.transaction():
            _add_user(connection)
            outbox.add(connection, SEND_VERIFY_EMAIL, ALICE)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    assert _rows(connection) == []
    assert connection.execute("SELECT * FROM users").fetchall() == []


def test_both_kinds_of_connection_work(connection: Connection, database_url: str) -> None:
    """An asynchronous caller awaits the result; commit and rollback work as for a synchronous one."""

    async def run() -> None:
        async with await psycopg.AsyncConnection.connect(database_url) as asynchronous:
            await outbox.add(asynchronous, SEND_VERIFY_EMAIL, ALICE)
            await asynchronous.rollback()
            assert isinstance(await outbox.add(asynchronous, SEND_VERIFY_EMAIL, {"username": "bob"}), int)
            await asynchronous.commit()

    asyncio.run(run())
    assert [row["payload"] for row in _rows(connection)] == [{"username": "bob"}]


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({}, "username"),
        ({"username": 1}, "username"),
        ({"username": "alice", "password": "x"}, "password"),
        ({"username": "a\0b"}, "username"),
        ({"username": "\ud800"}, "username"),
        (_UNCHECKED, "username"),
        (Report(month=1), "month"),
    ],
)
def test_a_payload_that_does_not_fit_is_refused(connection: Connection, payload: Any, field: str) -> None:
    """The error names the field, nothing is written, and the caller's transaction can continue."""
    with connection.transaction():
        with pytest.raises(outbox.PayloadError, match=f"{field}: "):
            outbox.add(connection, SEND_VERIFY_EMAIL, payload)
        _add_user(connection)
    assert _rows(connection) == []
    assert connection.execute("SELECT count(*) AS users FROM users").fetchall() == [{"users": 1}]


def test_options_override_the_tasks_defaults(connection: Connection) -> None:
    """Each option alone; zero counts as a value."""
    outbox.add(connection, REPORT, {"month": 1})
    outbox.add(connection, REPORT, {"month": 2}, delay=0, queue="critical", max_retries=0, timeout=1)
    outbox.add(connection, REPORT, {"month": 3}, delay=timedelta(hours=1.5))
    rows = _rows(connection)
    found = [(row["delay"], row["queue"], row["max_retries"], row["timeout"]) for row in rows]
    assert found == [(5, "default", 3, 60), (0, "critical", 0, 1), (5400, "default", 3, 60)]
    assert rows[0]["payload"] == {"month": 1, "notes": {}}


@pytest.mark.parametrize("options", [{"queue": "two words"}, {"max_retries": -1}, {"timeout": 0}, {"unique_key": ""}])
def test_options_beyond_the_limits_are_refused(connection: Connection, options: dict[str, Any]) -> None:
    """The table enforces its limits on every writer."""
    with pytest.raises(psycopg.errors.CheckViolation):
        outbox.add(connection, REPORT, {"month": 1}, **options)
    assert _rows(connection) == []


@pytest.mark.parametrize("option", ["request_id", "unique_key"])
def test_a_text_that_is_too_long_is_refused_before_it_is_sent(connection: Connection, option: str) -> None:
    """The sentence names the option and the limit, and not the text; the caller's transaction can continue."""
    with connection.transaction():
        for text in ("x" * 201, "é" * 3_000_000):
            options: Any = {option: text}
            with pytest.raises(outbox.OptionError) as caught:
                outbox.add(connection, REPORT, {"month": 1}, **options)
            assert str(caught.value) == f"{option} has {len(text)} characters: outbox.add takes at most 200"
        options = {option: "é" * 200}
        outbox.add(connection, REPORT, {"month": 1}, **options)
    assert [row[option] for row in _rows(connection)] == ["é" * 200]


def test_a_misspelt_option_is_refused(connection: Connection) -> None:
    """Only type checkers enforce a typed dictionary, and not every caller uses one."""
    options: Any = {"max_retry": 1, "dealy": 5}
    with pytest.raises(TypeError, match="dealy, max_retry"):
        outbox.add(connection, REPORT, {"month": 1}, **options)
    assert _rows(connection) == []


def test_a_unique_key_is_taken_until_its_row_is_done(connection: Connection) -> None:
    """No second row gets the key while the first is pending, enqueued, running or dead; `done` frees it."""

    def add() -> bool:
        return outbox.add(connection, REPORT, {"month": 1}, unique_key="month-1") is not None

    assert add()
    assert not add()
    for change in (
        "status = 'enqueued'",
        "status = 'running', lease_until = now()",
        "status = 'dead', lease_until = NULL",
    ):
        connection.execute(psycopg.sql.SQL("UPDATE outbox SET " + change))
        assert not add(), change
    connection.execute("UPDATE outbox SET status = 'done', done_at = now()")
    assert add()
    assert not add()
    assert outbox.add(connection, REPORT, {"month": 2}, unique_key="month-2") is not None
    assert len(_rows(connection)) == 3


def test_rows_without_a_key_may_repeat(connection: Connection) -> None:
    """Null is not a key."""
    for _ in range(2):
        outbox.add(connection, REPORT, {"month": 1})
    assert len(_rows(connection)) == 2


FORGOTTEN = """
from psycopg import AsyncConnection, Connection

import outbox
from outbox.signup.send_verify_email import SEND_VERIFY_EMAIL


async def order(connection: AsyncConnection, other: Connection) -> None:
    outbox.add(other, SEND_VERIFY_EMAIL, {"username": "alice"})
    row: int | None = await outbox.add(connection, SEND_VERIFY_EMAIL, {"username": "alice"})
    outbox.add(connection, SEND_VERIFY_EMAIL, {"username": "alice"})
"""


def test_type_checkers_report_a_forgotten_await(tmp_path: Path) -> None:
    """By default, and they report nothing else in an application's code."""
    (tmp_path / "order.py").write_text(FORGOTTEN)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--cache-dir", tmp_path / "cache", tmp_path / "order.py"],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    (line,) = [line for line in checked.stdout.splitlines() if "error" in line and "Found" not in line]
    assert "order.py:11" in line
    assert "unused-coroutine" in line


async def forget(connection: AsyncConnection[Any]) -> None:
    """Forgets to await, and so adds nothing."""
    outbox.add(connection, SEND_VERIFY_EMAIL, ALICE)  # type: ignore[unused-coroutine]


def test_python_reports_a_forgotten_await(connection: Connection, database_url: str) -> None:
    """As for every coroutine. Nothing is added, and a wrong payload is still refused."""

    async def run() -> None:
        async with await psycopg.AsyncConnection.connect(database_url) as asynchronous:
            with pytest.warns(RuntimeWarning, match="never awaited"):
                await forget(asynchronous)
            with pytest.raises(outbox.PayloadError):
                _ = outbox.add(asynchronous, SEND_VERIFY_EMAIL, {"name": "alice"})

    asyncio.run(run())
    assert _rows(connection) == []
