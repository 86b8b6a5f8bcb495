"""Collects the handlers that modules declare, by the name of their task."""

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
    """Returns the handlers that the modules declare, and those in `own`, by the name of their task.

    Raises:
        TaskError: a module cannot be imported or declares no handler, or two handlers claim one task.
    """
    registry = {handler.task.name: handler for handler in own}
    for name in modules:
        module = _import(name) if isinstance(name, str) else name
        handlers = [value for value in vars(module).values() if isinstance(value, Handler)]
        if not handlers:
            raise TaskError(f"the module {module.__name__} declares no handler")
        for handler in handlers:
            known = registry.setdefault(handler.task.name, handler)
            if known is not handler:
                raise TaskError(
                    f"task {handler.task.name} has two handlers, in {known.function.__module__} "
                    f"and {handler.function.__module__}: remove one"
                )
    return registry


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except TaskError as error:  # the module declares a task or handler wrongly
        raise TaskError(f"the module {name} with handlers cannot be imported: {error}") from error
    except Exception as error:  # importing runs the module, which may raise any error
        if not _is_missing(name, error):
            logs.get().error("handlers cannot be imported", module=name, error=one_line(error), exc_info=error)
        raise TaskError(f"the module {name} with handlers cannot be imported: {one_line(error)}") from error


def _is_missing(name: str, error: Exception) -> bool:
    """Returns whether the module itself does not exist: a misspelt name needs no traceback."""
    return isinstance(error, ModuleNotFoundError) and error.name is not None and f"{name}.".startswith(f"{error.name}.")
