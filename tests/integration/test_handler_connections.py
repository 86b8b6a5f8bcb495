"""The connections to Postgres that a worker lends its handlers."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NoReturn

import pytest
from psycopg import Cursor, IsolationLevel
from psycopg.rows import dict_row

import outbox
from outbox import Context
from outbox_worker.database import HandlerCursor, HandlerPool
from tests.conftest import Connection
from tests.support.attempts import NOTED, Note, try_once


@pytest.fixture
def pool(database_url: str) -> Iterator[HandlerPool]:
    """The pool that a worker passes to its handlers as `context.database`."""
    with HandlerPool(database_url) as pool:
        yield pool


def test_a_block_of_a_connection_is_one_transaction(
    connection: Connection, pool: HandlerPool, context: Context
) -> None:
    """An exception rolls back the rows that a handler wrote or added in the block; its end commits them."""

    def write(payload: Note, context: Context) -> None:
        with context.database.connection() as lent:
            lent.execute("INSERT INTO users VALUES (%s, 'hash', 'A User', %s)", [payload.text, f"{payload.text}@x.org"])
            outbox.add(lent, NOTED, {"text": payload.text})
            if payload.text == "fails":
                raise ZeroDivisionError

    context = replace(context, database=pool)
    assert try_once(write, context, payload='{"text": "fails"}').status == "pending"
    assert connection.execute("SELECT FROM users").fetchall() == []
    assert connection.execute("SELECT FROM outbox").fetchall() == []
    assert try_once(write, context, payload='{"text": "works"}').status == "done"
    assert len(connection.execute("SELECT FROM users").fetchall()) == 1
    assert len(connection.execute("SELECT FROM outbox").fetchall()) == 1


def test_a_statement_takes_no_longer_than_the_attempt(pool: HandlerPool, context: Context) -> None:
    """It is cancelled when the attempt's time is over, and none is begun after that. The pool keeps its size."""

    def sleep(_: Note, context: Context) -> None:
        with context.database.connection() as lent:
            lent.execute("SELECT pg_sleep(30)")

    context = replace(context, database=pool, deadline=time.monotonic() + 0.2)
    started = time.monotonic()
    assert try_once(sleep, context, timeout=1).status == "pending"
    assert time.monotonic() - started < 3
    late = try_once(sleep, context, timeout=1)
    assert (late.status, late.error) == ("pending", "the attempt took longer than its 1 s")
    for _ in range(2 * pool.max_size):
        with pool.connection() as lent:
            lent.execute("SELECT 1")


def test_waiting_for_a_connection_takes_no_longer_than_the_attempt(pool: HandlerPool, context: Context) -> None:
    """If all connections are lent, the attempt's time limit applies, not the pool's."""
    with ExitStack() as lent:
        for _ in range(pool.max_size):
            lent.enter_context(pool.connection())
        started = time.monotonic()

        def want(_: Note, context: Context) -> None:
            with context.database.connection():
                raise AssertionError("there is none")

        context = replace(context, database=pool, deadline=started + 0.3)
        assert try_once(want, context).status == "pending"
        assert 0.2 < time.monotonic() - started < 2


def test_what_a_handler_sets_on_a_connection_ends_with_its_block(
    connection: Connection, pool: HandlerPool, context: Context
) -> None:
    """The next block is a transaction that can write, whatever the last handler set."""
    context = replace(context, database=pool)

    def set_much(_: Note, context: Context) -> None:
        with context.database.connection() as lent:
            lent.autocommit = True
            lent.execute("VACUUM users")
        with context.database.connection() as lent:
            lent.read_only = True
            lent.isolation_level = IsolationLevel.SERIALIZABLE
            lent.row_factory, lent.cursor_factory = dict_row, Cursor
            lent.execute("SELECT 1")

    def fail_in_a_block(_: Note, context: Context) -> NoReturn:
        with context.database.connection() as lent:
            lent.execute("INSERT INTO users VALUES ('alice', 'hash', 'A User', 'alice@example.com')")
            assert lent.execute("SELECT 1").fetchone() == (1,)
            assert isinstance(lent.cursor(), HandlerCursor)
            raise ZeroDivisionError

    assert try_once(set_much, context).error is None
    assert str(try_once(fail_in_a_block, context).error).startswith("ZeroDivisionError")
    assert connection.execute("SELECT FROM users").fetchall() == []


def test_no_statement_is_begun_after_the_time_limit_except_the_commit(
    connection: Connection, pool: HandlerPool, context: Context
) -> None:
    """A loop of short statements ends with the attempt's time; the end of a block still commits."""

    def insert(_: Note, context: Context) -> None:
        with context.database.connection() as lent:
            lent.execute("INSERT INTO users VALUES ('alice', 'hash', 'A User', 'alice@example.com')")
            time.sleep(max(0.0, context.remaining + 0.05))

    def loop(begin: Callable[[Cursor[Any]], object]) -> Callable[[Note, Context], None]:
        def handle(_: Note, context: Context) -> None:
            with context.database.connection() as lent, lent.cursor() as cursor:
                for _number in range(300):
                    begin(cursor)
                    time.sleep(0.01)

        return handle

    def copy(cursor: Cursor[Any]) -> None:
        with cursor.copy("COPY (SELECT 1) TO STDOUT") as rows:
            list(rows)

    with pool.connection():
        pass  # a connection is there
    assert try_once(insert, replace(context, database=pool, deadline=time.monotonic() + 1)).status == "done"
    assert len(connection.execute("SELECT FROM users").fetchall()) == 1
    statements: list[Callable[[Cursor[Any]], object]] = [
        lambda cursor: cursor.execute("SELECT 1"),
        lambda cursor: cursor.executemany("SELECT %s", [[1], [2]]),
        lambda cursor: list(cursor.stream("SELECT 1")),
        copy,
    ]
    for statement in statements:
        outcome = try_once(loop(statement), replace(context, database=pool, deadline=time.monotonic() + 0.3), timeout=1)
        assert (outcome.status, outcome.error) == ("pending", "the attempt took longer than its 1 s")
