"""How a handler is tied to its task, and how the worker finds it.

A handler is one function, known to the worker alone. It registers itself nowhere: the worker looks for handlers in the
modules that it is told of.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic

from outbox.context import Context
from outbox.errors import TaskError
from outbox.outage import one_line
from outbox.task import P, Task

HandlerFunction = Callable[[P, Context], Mapping[str, object] | None]


@dataclass(frozen=True)
class Handler(Generic[P]):
    """A task together with the function that does it."""

    task: Task[P]
    function: HandlerFunction[P]


def handler(task: Task[P]) -> Callable[[HandlerFunction[P]], Handler[P]]:
    """Declares the decorated function to be the handler of `task`.

    The function is given the payload and a `Context`. It returns nothing, or fields for the `processed task` log
    line. It raises `SkipRetry` for what no retry can mend, and anything else for what should be tried again.
    """

    def declare(function: HandlerFunction[P]) -> Handler[P]:
        return Handler(task, function)

    return declare


Registry = Mapping[str, Handler[Any]]


def load_registry(modules: Iterable[str | ModuleType]) -> Registry:
    """Collects the handlers that the modules declare, by the name of their task.

    Raises:
        TaskError: a module cannot be imported or declares no handler, or two handlers claim one task.
    """
    registry: dict[str, Handler[Any]] = {}
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
    except Exception as error:  # importing runs the module: it may raise anything
        raise TaskError(f"the module {name} with handlers cannot be imported: {one_line(error)}") from error
