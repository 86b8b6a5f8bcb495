"""The log lines of an attempt."""

import json
import logging
from typing import Any, Literal, NoReturn

import psycopg
import pytest
import structlog
from structlog.testing import capture_logs

from outbox import Context, SkipRetry
from outbox.runtime import logs
from tests.support.attempts import Note, raising, try_once


@pytest.mark.parametrize(
    "fields",
    [{"duration": 1, "payload": 2}, {"event": "x"}, {1: 2}, {"self": 1}, "text", 42, True, ["x"], {"level": "x"}],
)
def test_a_strange_return_value_is_no_failure(fields: Any, context: Context) -> None:
    """The work is done and must not be repeated because its result cannot be logged."""
    with capture_logs() as lines:
        assert try_once(lambda *_: fields, context).status == "done"
    assert [line["event"] for line in lines] == ["processed task"]
    assert lines[0]["payload"] == {"text": "hello"}


def test_fields_that_a_handler_binds_end_with_its_attempt(context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    """Fields that a handler binds with structlog do not appear in the lines of the thread's next row."""

    def bind(_: Note, __: Context) -> None:
        structlog.contextvars.bind_contextvars(customer="alice")
        logs.get().info("inside")

    logs.configure("worker", "info", "json")
    try:
        try_once(bind, context)
        try_once(lambda *_: None, context)
    finally:
        logs.unconfigure()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["event"], line.get("customer")) for line in lines] == [
        ("inside", "alice"),
        ("processed task", "alice"),
        ("processed task", None),
    ]


def test_a_large_payload_is_cut_in_the_log(context: Context) -> None:
    """The line has the first characters of the stored text."""
    with capture_logs() as lines:
        assert try_once(lambda *_: None, context, payload=f'{{"text": "{"x" * 1_000_000}"}}').status == "done"
    assert lines[0]["payload"] == '{"text": "' + "x" * (logs.PAYLOAD_LIMIT - 10)


def test_a_handlers_error_is_logged_with_its_traceback(context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    """SkipRetry is logged without one. Secret codes in the traceback are masked."""
    code = "0123456789abcdef" * 4

    def fail_here(payload: Note, context: Context) -> NoReturn:
        raise ValueError(f"secret_code={code}")

    logs.configure("worker", "info", "json")
    try:
        try_once(fail_here, context)
        try_once(raising(SkipRetry("the user is gone")), context)
    finally:
        logs.unconfigure()
    failed, dead = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "in fail_here" in failed["exception"]
    assert "0123456789abcdef" not in failed["exception"]
    assert "exception" not in dead


def test_error_trackers_see_a_handlers_error(context: Context) -> None:
    """They hook into the standard library's logging, and need the exception itself."""
    seen: list[logging.LogRecord] = []

    class Tracker(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record)

    tracker = Tracker()
    logs.configure("worker", "info", "json")
    logging.getLogger().addHandler(tracker)
    try:
        try_once(raising(ValueError("no luck")), context)
        try_once(raising(ValueError("no luck")), context, attempt=4)
    finally:
        logging.getLogger().removeHandler(tracker)
        logs.unconfigure()
    assert [(record.getMessage(), record.levelname) for record in seen] == [
        ("process task failed", "WARNING"),
        ("process task failed", "ERROR"),
    ]
    assert all(record.exc_info and isinstance(record.exc_info[1], ValueError) for record in seen)
    assert vars(seen[0])["fields"]["row"] == 1


def test_a_bound_object_that_cannot_be_shown_does_not_change_the_outcome(
    context: Context, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its log line has the error in place of the field."""

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
            assert try_once(bind, context).error == "ValueError: no luck"
        finally:
            logs.unconfigure()
        line = capsys.readouterr().out
        assert "process task failed" in line
        assert "ZeroDivisionError" in line


@pytest.mark.parametrize(
    "error", [psycopg.errors.DeadlockDetected("a deadlock"), psycopg.errors.QueryCanceled("too long")]
)
def test_an_error_of_a_handlers_statement_has_its_traceback(context: Context, error: Exception) -> None:
    """Only an outage of Postgres is logged without one."""
    with capture_logs() as lines:
        try_once(raising(error), context)
        try_once(raising(psycopg.OperationalError("the connection is lost")), context)
    assert [line.get("exc_info") for line in lines] == [error, None]
