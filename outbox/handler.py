"""Handlers: functions with the tasks that they do.

A handler does not register itself: a worker looks for handlers in the modules that OUTBOX_HANDLERS names.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic

from outbox.context import Context
from outbox.errors import TaskError
from outbox.task import P, Task

HandlerFunction = Callable[[P, Context], Mapping[str, object] | None]


@dataclass(frozen=True)
class Handler(Generic[P]):
    """A task together with the function that does it. Calling the handler calls the function, as in a test.

    Raises:
        TaskError: see `handler`.

    Example:
        def test_greet(context: Context) -> None:
            assert greet.task is GREET
            assert greet(Greeting(username="alice"), context) == {"greeted": "alice"}
    """

    task: Task[P]
    function: HandlerFunction[P]

    def __post_init__(self) -> None:
        if defect := _defect(self.function):
            name = getattr(self.function, "__qualname__", repr(self.function))
            raise TaskError(f"the handler of {self.task.name}, {name}, {defect}")

    def __call__(self, payload: P, context: Context) -> Mapping[str, object] | None:
        """Calls the function."""
        return self.function(payload, context)


def handler(task: Task[P]) -> Callable[[HandlerFunction[P]], Handler[P]]:
    """Declares the decorated function to be the handler of `task`.

    The function gets the payload and a `Context`. It returns nothing, or fields for the `processed task` log line. It
    raises `SkipRetry` if no retry can help; after any other exception the row is tried again.

    Raises:
        TaskError: a worker's thread cannot call the function: it is a coroutine function, a generator function or a
            class, or has other parameters.

    Example:
        @handler(GREET)
        def greet(greeting: Greeting, context: Context) -> dict[str, object]:
            print(f"Hello, {greeting.username}!")
            return {"greeted": greeting.username}
    """

    def declare(function: HandlerFunction[P]) -> Handler[P]:
        return Handler(task, function)

    return declare


def _defect(function: Callable[..., object]) -> str | None:
    if inspect.isclass(function):
        return "is a class: make it a function"
    functions = (function, getattr(function, "__call__", None))  # noqa: B004 - an object's method
    if any(map(inspect.iscoroutinefunction, functions)):
        return "is a coroutine function, which nothing awaits: make it a plain function; it may call asyncio.run()"
    if any(map(inspect.isgeneratorfunction, functions)) or any(map(inspect.isasyncgenfunction, functions)):
        return "is a generator function, which nothing iterates over: make it a plain function"
    try:
        # The parameters of a decorated function are the decorator's business.
        inspect.signature(function, follow_wrapped=False).bind("payload", "context")
    except TypeError as error:
        return f"cannot be called with a payload and a context, in this order: {error}"
    except ValueError:  # a C function without a signature
        pass
    return None
