"""Handlers: what may be declared as a handler, and how a worker finds them."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from outbox import Context, Task, TaskError, handler
from outbox_worker.registry import load_registry
from tests.support.tasks import Nothing

TASK = Task("nothing", Nothing)


async def coroutine(payload: Nothing, context: Context) -> None:
    """Would never run."""


def generator(payload: Nothing, context: Context) -> Iterator[None]:
    """Would never run."""
    yield


async def asynchronous_generator(payload: Nothing, context: Context) -> AsyncIterator[None]:
    """Would never run."""
    yield


class Class:
    """Would only be instantiated."""

    def __init__(self, payload: Nothing, context: Context) -> None:
        pass


class CallableCoroutine:
    """An object whose call is a coroutine."""

    async def __call__(self, payload: Nothing, context: Context) -> None:
        """Would never run."""


def one_parameter(payload: Nothing) -> None:
    """Cannot be called with two arguments."""


def three_parameters(payload: Nothing, context: Context, more: int) -> None:
    """Cannot be called with two arguments."""


def needs_a_keyword(payload: Nothing, context: Context, *, more: int) -> None:
    """Cannot be called with two arguments."""


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (coroutine, "a coroutine function"),
        (partial(coroutine), "a coroutine function"),
        (CallableCoroutine(), "a coroutine function"),
        (generator, "a generator function"),
        (asynchronous_generator, "a generator function"),
        (Class, "a class"),
        (one_parameter, "too many positional arguments"),
        (three_parameters, "missing a required argument: 'more'"),
        (needs_a_keyword, "missing a required"),
        (lambda: None, "too many positional arguments"),
    ],
)
def test_a_handler_that_would_never_run_is_refused_at_its_declaration(function: Any, why: str) -> None:
    """Its rows would be done although their work is not."""
    with pytest.raises(TaskError, match=why) as refused:
        handler(TASK)(function)
    assert str(refused.value).startswith("the handler of nothing, ")


def test_a_handler_can_be_called() -> None:
    """A test of an application calls its handler like a function."""

    @handler(TASK)
    def handle(payload: Nothing, context: Any) -> Mapping[str, object]:
        return {"given": context}

    assert handle(Nothing(), "context") == {"given": "context"}  # type: ignore[arg-type]
    assert handle.task is TASK


def test_a_function_that_runs_a_coroutine_may_be_a_handler() -> None:
    """A plain function around asyncio.run returns when the work is done."""

    @handler(TASK)
    def handle(payload: Nothing, context: Any) -> None:
        asyncio.run(coroutine(payload, context))

    assert handle(Nothing(), None) is None  # type: ignore[arg-type]


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    """Writes a module and returns its name."""
    (folder / "handlers_here.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "handlers_here", raising=False)
    return "handlers_here"


def test_an_import_that_fails_is_logged_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error alone does not name the module and the line."""
    name = module(tmp_path, monkeypatch, "def fail():\n    return 1 / 0\n\nfail()\n")
    with (
        capture_logs() as lines,
        pytest.raises(TaskError, match="handlers_here with handlers cannot be imported: Zero"),
    ):
        load_registry([name])
    assert [(line["event"], type(line["exc_info"])) for line in lines] == [
        ("handlers cannot be imported", ZeroDivisionError)
    ]


def test_a_failed_import_in_a_module_is_logged_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelt name in OUTBOX_HANDLERS is not: its error says everything."""
    name = module(tmp_path, monkeypatch, "import no_such_module\n")
    with capture_logs() as lines, pytest.raises(TaskError, match="no_such_module"):
        load_registry([name])
    assert len(lines) == 1
    with capture_logs() as lines, pytest.raises(TaskError, match="no_such_handlers"):
        load_registry(["no_such_handlers.of_mine"])
    assert lines == []


def test_a_wrong_declaration_is_an_error_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the module, the handler and the remedy."""
    name = module(
        tmp_path,
        monkeypatch,
        "from outbox import Task, handler\nfrom tests.support.tasks import Nothing\n"
        "@handler(Task('nothing', Nothing))\nasync def greet(payload, context): ...\n",
    )
    with (
        capture_logs() as lines,
        pytest.raises(TaskError, match=r"handlers_here .* imported: the handler of nothing"),
    ):
        load_registry([name])
    assert lines == []


def test_a_decorator_may_pass_more_arguments() -> None:
    """The worker calls the function that the decorator returns."""

    def with_more(function: Any) -> Any:
        @wraps(function)
        def call(payload: Nothing, context: Context) -> Any:
            return function(payload, context, "more")

        return call

    @handler(TASK)
    @with_more
    def handle(payload: Nothing, context: Context, more: str) -> Mapping[str, object]:
        return {"more": more}

    assert handle(Nothing(), None) == {"more": "more"}  # type: ignore[arg-type]
