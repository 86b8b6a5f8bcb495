"""The handlers of this service: one module each. Every module in this folder is loaded."""

import pkgutil

from outbox.registry import Registry, load_registry


def registry(further: tuple[str, ...] = ()) -> Registry:
    """Returns the handlers of this folder and of the further modules (`OUTBOX_HANDLERS`), by task name.

    Raises:
        TaskError: a module cannot be imported, or two handlers claim one task.
    """
    own = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    return load_registry([*own, *further])
