"""What tests give a handler."""

from dataclasses import dataclass

from outbox.context import Context
from outbox.runtime.settings import WorkerSettings


@dataclass(frozen=True)
class KnownContext(Context):
    """A context, and the settings of the worker that it is of: handlers do not see them."""

    settings: WorkerSettings
