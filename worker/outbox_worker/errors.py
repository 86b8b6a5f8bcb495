"""Why a worker ends by itself, with code 1: its supervisor starts another."""

from outbox.errors import OutboxError


class NoThreadsError(OutboxError):
    """The system lets this process start no thread, and it has none that could run a handler."""


class ThreadEndedError(OutboxError):
    """A thread that the worker cannot do without has ended."""


class OverdueError(OutboxError):
    """A handler runs for longer than its time limit and a grace, and nothing can end it but the end of the process."""
