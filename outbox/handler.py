"""Ties a function to the task that it handles.

A handler registers itself nowhere: a worker looks for handlers in the modules that OUTBOX_HANDLERS names.
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
    """A task together with the function that does it. It can be called as that function can.

    Raises:
        TaskError: see `handler`.
    """

    task: Task[P]
    function: HandlerFunction[P]

    def __post_init__(self) -> None:
        if wrong := _what_is_wrong(self.function):
            name = getattr(self.function, "__qualname__", repr(self.function))
            raise TaskError(f"the handler of {self.task.name}, {name}, {wrong}")

    def __call__(self, payload: P, context: Context) -> Mapping[str, object] | None:
        """Calls the function, as a test of it would."""
        return self.function(payload, context)


def handler(task: Task[P]) -> Callable[[HandlerFunction[P]], Handler[P]]:
    """Declares the decorated function to be the handler of `task`.

    The function is given the payload and a `Context`. It returns nothing, or fields for the `processed task` log
    line. It raises `SkipRetry` for what no retry can mend, and anything else for what should be tried again.

    Raises:
        TaskError: it is no function that a worker's thread can call so: a coroutine function, a generator function, a
            class, or a function with other parameters.
    """

    def declare(function: HandlerFunction[P]) -> Handler[P]:
        return Handler(task, function)

    return declare


def _what_is_wrong(function: Callable[..., object]) -> str | None:
    if inspect.isclass(function):
        return "is a class: make it a function"
    called = (function, getattr(function, "__call__", None))  # noqa: B004 - of an object, its method
    if any(map(inspect.iscoroutinefunction, called)):
        return "is a coroutine function, which nobody awaits: make it a plain function; asyncio.run() may stand in it"
    if any(map(inspect.isgeneratorfunction, called)) or any(map(inspect.isasyncgenfunction, called)):
        return "is a generator function, which nobody iterates over: make it a plain function"
    try:
        # What a decorator wraps may take more: the decorator gives it that.
        inspect.signature(function, follow_wrapped=False).bind("payload", "context")
    except TypeError as error:
        return f"cannot be called with a payload and a context, in this order: {error}"
    except ValueError:  # written in C, without a signature
        pass
    return None
