"""One attempt: the values that a handler may return, the errors that it may raise, and the outcome of its row."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel, model_validator
from structlog.testing import capture_logs

from outbox import Context, Handler, SkipRetry, Task
from outbox.errors import NotNowError, TimeLimitError
from outbox.row import Status
from outbox.rq_jobs import Delivery
from outbox_worker.attempt import NOT_NOW_DELAY, attempt
from outbox_worker.claim import claim
from outbox_worker.complete import Completer
from outbox_worker.in_flight import InFlight
from outbox_worker.outcome import Outcome
from tests.conftest import Connection
from tests.support.attempts import NOTED, Note, claim_of, raising, try_once
from tests.support.rows import add_row, read_row


class Unspeakable(Exception):  # noqa: N818
    """An error whose text cannot be read."""

    def __str__(self) -> str:
        raise SystemExit("no")


class Drastic(BaseException):
    """Not an Exception."""


def test_a_handler_that_returns_is_done(context: Context) -> None:
    """The log line carries the payload, the handler's own fields and the duration."""
    with capture_logs() as lines:
        outcome = try_once(lambda payload, _: {"email": f"{payload.text}@example.com"}, context)
    assert outcome == Outcome(Delivery(1, 1), Status.DONE, 1)
    assert (lines[0]["event"], lines[0]["payload"]) == ("processed task", {"text": "hello"})
    assert lines[0]["email"] == "hello@example.com"
    assert lines[0]["duration"] >= 0


@pytest.mark.parametrize("attempt_number", [1, 4])
def test_an_attempt_while_a_server_is_away_does_not_count(attempt_number: int, context: Context) -> None:
    """Not even the last one; the row has the error, and nothing is logged per row."""
    with capture_logs() as lines:
        outcome = try_once(raising(NotNowError("a server is away")), context, attempt=attempt_number)
    error = "NotNowError: a server is away"
    assert outcome == Outcome(Delivery(1, 1), Status.PENDING, attempt_number - 1, NOT_NOW_DELAY, error)
    assert not lines


@pytest.mark.parametrize("attempt_number", [1, 4])
def test_skip_retry_is_dead_at_once(attempt_number: int, context: Context) -> None:
    """With the handler's own text, however many retries are left."""
    with capture_logs() as lines:
        outcome = try_once(raising(SkipRetry("the user is gone")), context, attempt=attempt_number)
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
    outcome = try_once(raising(AssertionError("called")), context, payload='{"text": [1]}', attempt=99)
    assert (outcome.status, outcome.attempts, outcome.unhandled) == ("pending", 98, True)
    assert "text: " in str(outcome.error)


def test_a_handler_that_adds_a_payload_that_does_not_fit_fails(context: Context) -> None:
    """The fault is the handler's, not its row's: the attempt counts and is repeated."""

    def add(_: Note, __: Context) -> None:
        NOTED.dump({"text": 5})

    with capture_logs():
        outcome = try_once(add, context, attempt=2)
    assert (outcome.status, outcome.attempts, outcome.unhandled) == ("pending", 2, False)


def test_a_model_that_raises_is_a_failure(context: Context) -> None:
    """A validator is the application's code: any error other than ValueError counts."""

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
def test_any_error_of_a_handler_is_retried(error: BaseException, context: Context) -> None:
    """No error leaves the attempt, not even a BaseException; the log has the seconds until the next attempt."""
    with capture_logs() as lines:
        outcome = try_once(raising(error), context, attempt=2)
    assert (outcome.status, outcome.attempts) == ("pending", 2)
    assert 16 <= outcome.delay <= 76, "asynq's formula at the second attempt"
    assert outcome.error
    (line,) = lines
    assert (line["event"], line["error"], line["attempt"]) == ("process task failed", outcome.error, 2)
    assert line["next_try"] == pytest.approx(outcome.delay, abs=0.06)


def test_retries_are_used_up(context: Context) -> None:
    """The first attempt and `max_retries` more; then the row is dead."""
    function = raising(ValueError("no luck"))
    assert [try_once(function, context, attempt=n, max_retries=2).status for n in (1, 2, 3)] == ["pending"] * 2 + [
        "dead"
    ]
    assert try_once(function, context, attempt=1, max_retries=0).status == "dead"


def test_an_unknown_task_is_kept_for_a_newer_worker(context: Context) -> None:
    """The attempt does not count, however many were made, and the error names the task."""
    outcome = try_once(raising(AssertionError()), context, task="brand_new", attempt=99)
    assert (outcome.status, outcome.attempts, outcome.unhandled) == ("pending", 98, True)
    assert "brand_new" in str(outcome.error)


def test_errors_can_be_stored_and_read(connection: Connection, database_url: str, context: Context) -> None:
    """A text with NUL, lone surrogates or line breaks, or a long one, is stored as one printable line."""
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


async def work() -> None:
    """Would work if it were awaited."""


def generate() -> Iterator[int]:
    """Would work if it were iterated over."""
    yield 1


async def generate_later() -> AsyncIterator[int]:
    """Would work if it were iterated over."""
    yield 1


@pytest.mark.parametrize("unfinished", [work, generate, generate_later, Future])
def test_a_result_that_the_worker_would_have_to_run_is_a_failure(
    unfinished: Callable[[], Any], context: Context
) -> None:
    """A lambda or a decorator may hide that a handler returns a coroutine: its row is not done."""
    with capture_logs() as lines:
        outcome = try_once(lambda *_: unfinished(), context)
    assert outcome.status == "pending"
    assert "which the worker does not run" in str(outcome.error)
    assert [line["event"] for line in lines] == ["process task failed"]


def test_a_handler_knows_how_much_time_is_left(context: Context) -> None:
    """It may use `remaining` as a time-out; it is never negative."""
    remaining: list[float] = []
    try_once(lambda _, given: remaining.append(given.remaining), context)
    try_once(lambda _, given: remaining.append(given.remaining), replace(context, deadline=time.monotonic() - 5))
    assert 29 < remaining[0] <= 30
    assert remaining[1] == 0
