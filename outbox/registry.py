"""How a handler is tied to its task, and how the worker finds it.

A handler is one function, known to the worker alone. It registers itself nowhere: the worker looks for handlers in the
modules that it is told of.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic

from outbox import logs
from outbox.context import Context
from outbox.errors import TaskError
from outbox.outage import one_line
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


Registry = Mapping[str, Handler[Any]]


def load_registry(modules: Iterable[str | ModuleType], own: Iterable[Handler[Any]] = ()) -> Registry:
    """Collects the handlers that the modules declare, and those that are given, by the name of their task.

    Raises:
        TaskError: a module cannot be imported or declares no handler, or two handlers claim one task.
    """
    registry = {given.task.name: given for given in own}
    for name in modules:
        module = _imported(name) if isinstance(name, str) else name
        handlers = [found for found in vars(module).values() if isinstance(found, Handler)]
        if not handlers:
            raise TaskError(f"the module {module.__name__} declares no handler")
        for found in handlers:
            known = registry.setdefault(found.task.name, found)
            if known is not found:
                raise TaskError(
                    f"task {found.task.name} has two handlers, in {known.function.__module__} "
                    f"and {found.function.__module__}: remove one"
                )
    return registry


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except TaskError as error:  # a task or handler in it is declared wrongly
        raise TaskError(f"the module {name} with handlers cannot be imported: {error}") from error
    except Exception as error:  # importing runs the module: it may raise anything
        if not _is_missing(name, error):
            logs.get().error("handlers cannot be imported", module=name, error=one_line(error), exc_info=error)
        raise TaskError(f"the module {name} with handlers cannot be imported: {one_line(error)}") from error


def _is_missing(name: str, error: Exception) -> bool:
    """Whether there is no such module: a name that is misspelt needs no traceback."""
    return isinstance(error, ModuleNotFoundError) and error.name is not None and f"{name}.".startswith(f"{error.name}.")
