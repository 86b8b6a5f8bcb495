"""A transactional outbox: work that commits with the change it belongs to and survives every outage."""

from outbox.add import add
from outbox.context import Context
from outbox.errors import OptionError, OutboxError, PayloadError, SkipRetry, TaskError
from outbox.handler import Handler, handler
from outbox.task import Task

__all__ = [
    "Context",
    "Handler",
    "OptionError",
    "OutboxError",
    "PayloadError",
    "SkipRetry",
    "Task",
    "TaskError",
    "add",
    "handler",
]
