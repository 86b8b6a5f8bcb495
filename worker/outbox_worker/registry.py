"""Finds the handlers in modules, by the name of their task."""

import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from outbox.errors import TaskError
from outbox.handler import Handler
from outbox.runtime import logs
from outbox.runtime.redaction import one_line

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
