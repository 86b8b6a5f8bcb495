"""Handlers: what may be declared as one, and how a worker finds them."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from structlog.testing import capture_logs

from outbox import Context, Task, TaskError, handler
from outbox_worker.registry import load_registry


class Nothing(BaseModel):
    """A payload of nothing."""


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
    """Would only be made."""

    def __init__(self, payload: Nothing, context: Context) -> None:
        pass


class CallableCoroutine:
    """An object whose call is a coroutine."""

    async def __call__(self, payload: Nothing, context: Context) -> None:
        """Would never run."""


def one_parameter(payload: Nothing) -> None:
    """Cannot be called with two."""


def three_parameters(payload: Nothing, context: Context, more: int) -> None:
    """Cannot be called with two."""


def needs_a_keyword(payload: Nothing, context: Context, *, more: int) -> None:
    """Cannot be called with two."""


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
def test_what_would_never_run_is_refused_where_it_is_declared(function: Any, why: str) -> None:
    """A row of such a handler would be done, and nothing have happened."""
    with pytest.raises(TaskError, match=why) as refused:
        handler(TASK)(function)
    assert str(refused.value).startswith("the handler of nothing, ")


def test_a_handler_can_be_called() -> None:
    """A test of an application calls its handler as the function that it is."""

    @handler(TASK)
    def handle(payload: Nothing, context: Any) -> Mapping[str, object]:
        return {"given": context}

    assert handle(Nothing(), "context") == {"given": "context"}  # type: ignore[arg-type]
    assert handle.task is TASK


def test_what_runs_a_coroutine_itself_may_be_a_handler() -> None:
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
    """The sentence alone hides which line of which module it was."""
    name = module(tmp_path, monkeypatch, "def fail():\n    return 1 / 0\n\nfail()\n")
    with (
        capture_logs() as lines,
        pytest.raises(TaskError, match="handlers_here with handlers cannot be imported: Zero"),
    ):
        load_registry([name])
    assert [(line["event"], type(line["exc_info"])) for line in lines] == [
        ("handlers cannot be imported", ZeroDivisionError)
    ]


def test_a_module_that_is_missing_in_one_of_ours_is_logged_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike a name in OUTBOX_HANDLERS that is misspelt: the sentence says all about that."""
    name = module(tmp_path, monkeypatch, "import no_such_module\n")
    with capture_logs() as lines, pytest.raises(TaskError, match="no_such_module"):
        load_registry([name])
    assert len(lines) == 1
    with capture_logs() as lines, pytest.raises(TaskError, match="no_such_handlers"):
        load_registry(["no_such_handlers.of_mine"])
    assert lines == []


def test_a_wrong_declaration_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names module and handler, and what to do."""
    name = module(
        tmp_path,
        monkeypatch,
        "from tests.unit.test_registry import TASK\nfrom outbox import handler\n"
        "@handler(TASK)\nasync def greet(payload, context): ...\n",
    )
    with (
        capture_logs() as lines,
        pytest.raises(TaskError, match=r"handlers_here .* imported: the handler of nothing"),
    ):
        load_registry([name])
    assert lines == []


def test_a_decorator_may_give_the_function_more() -> None:
    """What is called is what the decorator returns."""

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
