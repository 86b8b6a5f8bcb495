"""One attempt: what a handler may do, and what becomes of its row."""

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, NoReturn

import psycopg
import pytest
import structlog
from psycopg import Cursor, IsolationLevel
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool
from pydantic import BaseModel, model_validator
from structlog.testing import capture_logs

import outbox
from outbox import Context, Handler, SkipRetry, Task
from outbox.errors import NotNowError, TimeLimitError
from outbox.row import Status
from outbox.rq_jobs import Delivery
from outbox.runtime import logs
from outbox.runtime.settings import WorkerSettings
from outbox_worker.attempt import NOT_NOW_DELAY, attempt
from outbox_worker.claim import Claim, claim
from outbox_worker.complete import Completer
from outbox_worker.database import HandlerCursor, HandlerPool
from outbox_worker.in_flight import InFlight
from outbox_worker.outcome import Outcome
from tests.conftest import Connection
from tests.support.rows import add_row, read_row


class Note(BaseModel):
    """A payload."""

    text: str = ""


NOTED = Task("noted", Note)

Function = Callable[[Note, Context], Mapping[str, object] | None]


@pytest.fixture
def context() -> Context:
    """What handlers are given; these need none of it."""
    settings = WorkerSettings.model_validate(
        {
            "database_url": "postgresql://nowhere/none",
            "redis_url": "redis://nowhere",
            "smtp_server": "smtp://nowhere",
            "mail_from": "no-reply@example.com",
            "public_url": "http://localhost",
            "secret_key": "k" * 32,
        }
    )
    pool: ConnectionPool[Any] = ConnectionPool(settings.database_url, min_size=0, max_size=1, open=False)
    return Context(row_id=1, attempt=1, deadline=time.monotonic() + 30, database=pool, send=lambda _: None)


def claim_of(**changes: Any) -> Claim:
    """Returns a claim that no database knows."""
    values: dict[str, Any] = {
        "delivery": Delivery(1, 1),
        "task": "noted",
        "payload": '{"text": "hello"}',
        "queue": "default",
        "attempt": 1,
        "max_retries": 3,
        "timeout": 30,
        "request_id": None,
    }
    return Claim(**{**values, **changes})


def tried(function: Function, context: Context, **changes: Any) -> Outcome:
    """Makes one attempt with a handler, and has it reported."""
    outcome, report = attempt(claim_of(**changes), {"noted": Handler(NOTED, function)}, context, 3600)
    if report is not None:
        report()
    return outcome


def raising(error: BaseException) -> Function:
    """Returns a handler that raises."""

    def function(payload: Note, context: Context) -> NoReturn:
        raise error

    return function


class Unspeakable(Exception):  # noqa: N818
    """An error that cannot even say what it is."""

    def __str__(self) -> str:
        raise SystemExit("no")


class Drastic(BaseException):
    """Not an Exception."""


def test_a_handler_that_returns_is_done(context: Context) -> None:
    """The log line carries the payload, the handler's own fields and the duration."""
    with capture_logs() as lines:
        outcome = tried(lambda payload, _: {"email": f"{payload.text}@example.com"}, context)
    assert outcome == Outcome(Delivery(1, 1), Status.DONE, 1)
    assert (lines[0]["event"], lines[0]["payload"]) == ("processed task", {"text": "hello"})
    assert lines[0]["email"] == "hello@example.com"
    assert lines[0]["duration"] >= 0


@pytest.mark.parametrize(
    "fields",
    [{"duration": 1, "payload": 2}, {"event": "x"}, {1: 2}, {"self": 1}, "text", 42, True, ["x"], {"level": "x"}],
)
def test_a_strange_return_value_is_no_failure(fields: Any, context: Context) -> None:
    """The work is done; it must not be done again because its log line is odd."""
    with capture_logs() as lines:
        assert tried(lambda *_: fields, context).status == "done"
    assert [line["event"] for line in lines] == ["processed task"]
    assert lines[0]["payload"] == {"text": "hello"}


@pytest.mark.parametrize("attempt_number", [1, 4])
def test_what_is_no_fault_of_the_row_does_not_count(attempt_number: int, context: Context) -> None:
    """Not even at the last attempt; the row says what was wrong, and the log does not say it row by row."""
    with capture_logs() as lines:
        outcome = tried(raising(NotNowError("a server is away")), context, attempt=attempt_number)
    error = "NotNowError: a server is away"
    assert outcome == Outcome(Delivery(1, 1), Status.PENDING, attempt_number - 1, NOT_NOW_DELAY, error)
    assert not lines


@pytest.mark.parametrize("attempt_number", [1, 4])
def test_skip_retry_is_dead_at_once(attempt_number: int, context: Context) -> None:
    """With the handler's own sentence, however many retries are left."""
    with capture_logs() as lines:
        outcome = tried(raising(SkipRetry("the user is gone")), context, attempt=attempt_number)
    assert outcome == Outcome(Delivery(1, 1), Status.DEAD, attempt_number, error="the user is gone")
    assert lines == [
        {
            "event": "process task failed",
            "log_level": "error",
            "error": "the user is gone",
            "attempt": attempt_number,
            "next_try": None,
        }
    ]


def test_a_payload_that_does_not_fit_is_kept_for_another_worker(context: Context) -> None:
    """The handler is not called, the attempt does not count, and the error names the field."""
    outcome = tried(raising(AssertionError("called")), context, payload='{"text": [1]}', attempt=99)
    assert (outcome.status, outcome.attempts, outcome.unhandled) == ("pending", 98, True)
    assert "text: " in str(outcome.error)


def test_a_payload_that_a_handler_adds_and_does_not_fit_is_a_failure(context: Context) -> None:
    """It is the handler's mistake and not its row's: it counts, and is tried again as any other."""

    def add(_: Note, __: Context) -> None:
        NOTED.dump({"text": 5})

    with capture_logs():
        outcome = tried(add, context, attempt=2)
    assert (outcome.status, outcome.attempts, outcome.unhandled) == ("pending", 2, False)


def test_a_model_that_raises_is_a_failure(context: Context) -> None:
    """A validator is the application's code, and what else it raises than ValueError counts."""

    class Picky(BaseModel):
        @model_validator(mode="after")
        def check(self) -> "Picky":
            raise ZeroDivisionError("no luck")

    claimed = claim_of(task="picky", payload="{}")
    outcome = attempt(claimed, {"picky": Handler(Task("picky", Picky), lambda *_: None)}, context, 3600).outcome
    assert (outcome.status, outcome.attempts, outcome.error) == ("pending", 1, "ZeroDivisionError: no luck")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no luck"),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        Drastic("stop"),
        MemoryError(),
        RecursionError("deep"),
        Unspeakable(),
        TimeLimitError(),
    ],
)
def test_whatever_a_handler_raises_is_tried_again(error: BaseException, context: Context) -> None:
    """Not only exceptions: nothing a handler raises leaves the attempt, and the log says when it is tried again."""
    with capture_logs() as lines:
        outcome = tried(raising(error), context, attempt=2)
    assert (outcome.status, outcome.attempts) == ("pending", 2)
    assert 16 <= outcome.delay <= 76, "asynq's formula at the second attempt"
    assert outcome.error
    (line,) = lines
    assert (line["event"], line["error"], line["attempt"]) == ("process task failed", outcome.error, 2)
    assert line["next_try"] == pytest.approx(outcome.delay, abs=0.06)


def test_retries_are_used_up(context: Context) -> None:
    """The first attempt and `max_retries` more; then the row is dead."""
    function = raising(ValueError("no luck"))
    assert [tried(function, context, attempt=n, max_retries=2).status for n in (1, 2, 3)] == ["pending"] * 2 + ["dead"]
    assert tried(function, context, attempt=1, max_retries=0).status == "dead"


def test_an_unknown_task_is_kept_for_a_newer_worker(context: Context) -> None:
    """It is not counted, however often that was tried, and the error names the task."""
    outcome = tried(raising(AssertionError()), context, task="brand_new", attempt=99)
    assert (outcome.status, outcome.attempts, outcome.unhandled) == ("pending", 98, True)
    assert "brand_new" in str(outcome.error)


def test_errors_can_be_stored_and_read(connection: Connection, database_url: str, context: Context) -> None:
    """NUL, halves of surrogate pairs and endless texts end as one readable line in the row."""
    texts = ["a\0b", "lone \ud800", "x" * 100_000, "two\nlines"]
    functions = [raising(kind(text)) for kind in (ValueError, SkipRetry) for text in texts]
    claims = claim(connection, [add_row(connection) for _ in functions], "me", 15)
    completer = Completer(database_url, InFlight(), "me", 15)
    for claimed, function in zip(claims, functions, strict=True):
        completer.in_flight.put(attempt(claimed, {"noted": Handler(NOTED, function)}, context, 3600).outcome)
    completer.start()
    assert completer.close(5) == []
    rows = [read_row(connection, claimed.delivery) for claimed in claims]
    assert [row["status"] for row in rows] == ["pending"] * 4 + ["dead"] * 4
    for row in rows:
        assert 0 < len(row["last_error"]) <= 500
        assert row["last_error"].isprintable()


def test_what_a_handler_binds_to_its_log_ends_with_it(context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    """Fields that a handler binds by structlog's own means do not turn up in the lines of the thread's next row."""

    def bind(_: Note, __: Context) -> None:
        structlog.contextvars.bind_contextvars(customer="alice")
        logs.get().info("inside")

    logs.configure("worker", "info", "json")
    try:
        tried(bind, context)
        tried(lambda *_: None, context)
    finally:
        logs.reset()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["event"], line.get("customer")) for line in lines] == [
        ("inside", "alice"),
        ("processed task", "alice"),
        ("processed task", None),
    ]


def test_of_a_large_payload_the_log_shows_the_beginning(context: Context) -> None:
    """A line is for people, whatever a row carries."""
    with capture_logs() as lines:
        assert tried(lambda *_: None, context, payload=f'{{"text": "{"x" * 1_000_000}"}}').status == "done"
    assert lines[0]["payload"] == '{"text": "' + "x" * (logs.PAYLOAD_LIMIT - 10)


async def work() -> None:
    """Would be done if it were awaited."""


def generate() -> Iterator[int]:
    """Would be done if it were iterated over."""
    yield 1


async def generate_later() -> AsyncIterator[int]:
    """Would be done if it were iterated over."""
    yield 1


@pytest.mark.parametrize("unfinished", [work, generate, generate_later, Future])
def test_work_that_nobody_does_is_a_failure(unfinished: Callable[[], Any], context: Context) -> None:
    """A lambda or a decorator may hide what a handler returns: it is never taken for done."""
    with capture_logs() as lines:
        outcome = tried(lambda *_: unfinished(), context)
    assert outcome.status == "pending"
    assert "which the worker does not run" in str(outcome.error)
    assert [line["event"] for line in lines] == ["process task failed"]


def test_a_handlers_error_is_logged_with_its_traceback(context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it was raised; not for what says in a sentence what is wrong. Secret codes in it are masked."""
    code = "0123456789abcdef" * 4

    def fail_here(payload: Note, context: Context) -> NoReturn:
        raise ValueError(f"secret_code={code}")

    logs.configure("worker", "info", "json")
    try:
        tried(fail_here, context)
        tried(raising(SkipRetry("the user is gone")), context)
    finally:
        logs.reset()
    failed, dead = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "in fail_here" in failed["exception"]
    assert "0123456789abcdef" not in failed["exception"]
    assert "exception" not in dead


def test_error_trackers_see_a_handlers_error(context: Context) -> None:
    """They listen to the standard library's logging, and want the exception itself."""
    seen: list[logging.LogRecord] = []

    class Tracker(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record)

    tracker = Tracker()
    logs.configure("worker", "info", "json")
    logging.getLogger().addHandler(tracker)
    try:
        tried(raising(ValueError("no luck")), context)
        tried(raising(ValueError("no luck")), context, attempt=4)
    finally:
        logging.getLogger().removeHandler(tracker)
        logs.reset()
    assert [(record.getMessage(), record.levelname) for record in seen] == [
        ("process task failed", "WARNING"),
        ("process task failed", "ERROR"),
    ]
    assert all(record.exc_info and isinstance(record.exc_info[1], ValueError) for record in seen)
    assert vars(seen[0])["fields"]["row"] == 1


def test_a_bound_object_that_cannot_be_shown_costs_its_line_a_field(
    context: Context, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever logging meets there, the attempt's outcome is what it was."""

    class Mute:
        def __str__(self) -> str:
            raise ZeroDivisionError

        __repr__ = __str__

    def bind(_: Note, __: Context) -> NoReturn:
        structlog.contextvars.bind_contextvars(customer=Mute())
        raise ValueError("no luck")

    formats: list[Literal["json", "console"]] = ["json", "console"]
    for log_format in formats:
        logs.configure("worker", "info", log_format)
        try:
            assert tried(bind, context).error == "ValueError: no luck"
        finally:
            logs.reset()
        line = capsys.readouterr().out
        assert "process task failed" in line
        assert "ZeroDivisionError" in line


def test_the_time_that_is_left_is_told(context: Context) -> None:
    """A handler takes it as its time-out for what it calls; it never is less than nothing."""
    told: list[float] = []
    tried(lambda _, given: told.append(given.remaining), context)
    tried(lambda _, given: told.append(given.remaining), replace(context, deadline=time.monotonic() - 5))
    assert 29 < told[0] <= 30
    assert told[1] == 0


@pytest.fixture
def pool(database_url: str) -> Iterator[HandlerPool]:
    """What a worker lends its handlers as `context.database`."""
    with HandlerPool(database_url) as opened:
        yield opened


def test_a_block_of_a_connection_is_one_transaction(
    connection: Connection, pool: HandlerPool, context: Context
) -> None:
    """What a handler wrote and added in it is undone by an exception, and else committed."""

    def write(payload: Note, context: Context) -> None:
        with context.database.connection() as lent:
            lent.execute("INSERT INTO users VALUES (%s, 'hash', 'A User', %s)", [payload.text, f"{payload.text}@x.org"])
            outbox.add(lent, NOTED, {"text": payload.text})
            if payload.text == "fails":
                raise ZeroDivisionError

    context = replace(context, database=pool)
    assert tried(write, context, payload='{"text": "fails"}').status == "pending"
    assert connection.execute("SELECT FROM users").fetchall() == []
    assert connection.execute("SELECT FROM outbox").fetchall() == []
    assert tried(write, context, payload='{"text": "works"}').status == "done"
    assert len(connection.execute("SELECT FROM users").fetchall()) == 1
    assert len(connection.execute("SELECT FROM outbox").fetchall()) == 1


def test_a_statement_takes_no_longer_than_the_attempt(pool: HandlerPool, context: Context) -> None:
    """It is given up when the attempt's time is over; none is begun after that. The pool loses nothing over it."""

    def sleep(_: Note, context: Context) -> None:
        with context.database.connection() as lent:
            lent.execute("SELECT pg_sleep(30)")

    context = replace(context, database=pool, deadline=time.monotonic() + 0.2)
    started = time.monotonic()
    assert tried(sleep, context, timeout=1).status == "pending"
    assert time.monotonic() - started < 3
    late = tried(sleep, context, timeout=1)
    assert (late.status, late.error) == ("pending", "the attempt took longer than its 1 s")
    for _ in range(2 * pool.max_size):
        with pool.connection() as lent:
            lent.execute("SELECT 1")


def test_waiting_for_a_connection_takes_no_longer_than_the_attempt(pool: HandlerPool, context: Context) -> None:
    """With every connection lent, an attempt waits for its own time and not for the pool's."""
    with ExitStack() as lent:
        for _ in range(pool.max_size):
            lent.enter_context(pool.connection())
        started = time.monotonic()

        def want(_: Note, context: Context) -> None:
            with context.database.connection():
                raise AssertionError("there is none")

        context = replace(context, database=pool, deadline=started + 0.3)
        assert tried(want, context).status == "pending"
        assert 0.2 < time.monotonic() - started < 2


def test_what_a_handler_sets_on_a_connection_ends_with_its_block(
    connection: Connection, pool: HandlerPool, context: Context
) -> None:
    """The next block is a transaction that can write, whatever the last one needed."""
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

    assert tried(set_much, context).error is None
    assert str(tried(fail_in_a_block, context).error).startswith("ZeroDivisionError")
    assert connection.execute("SELECT FROM users").fetchall() == []


def test_no_statement_is_begun_after_the_time_and_what_was_done_is_committed(
    connection: Connection, pool: HandlerPool, context: Context
) -> None:
    """A loop of short statements ends when the attempt's time does; the end of a block is none."""

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
    assert tried(insert, replace(context, database=pool, deadline=time.monotonic() + 1)).status == "done"
    assert len(connection.execute("SELECT FROM users").fetchall()) == 1
    statements: list[Callable[[Cursor[Any]], object]] = [
        lambda cursor: cursor.execute("SELECT 1"),
        lambda cursor: cursor.executemany("SELECT %s", [[1], [2]]),
        lambda cursor: list(cursor.stream("SELECT 1")),
        copy,
    ]
    for statement in statements:
        outcome = tried(loop(statement), replace(context, database=pool, deadline=time.monotonic() + 0.3), timeout=1)
        assert (outcome.status, outcome.error) == ("pending", "the attempt took longer than its 1 s")


@pytest.mark.parametrize(
    "error", [psycopg.errors.DeadlockDetected("a deadlock"), psycopg.errors.QueryCanceled("too long")]
)
def test_a_fault_of_a_handlers_statement_has_its_traceback(context: Context, error: Exception) -> None:
    """Only an outage of Postgres is told in a sentence."""
    with capture_logs() as lines:
        tried(raising(error), context)
        tried(raising(psycopg.OperationalError("the connection is lost")), context)
    assert [line.get("exc_info") for line in lines] == [error, None]
