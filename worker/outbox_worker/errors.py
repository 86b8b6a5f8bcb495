"""Errors that end a worker with exit code 1, so that its supervisor starts another."""

from outbox.errors import OutboxError


class NoThreadsError(OutboxError):
    """The system refuses this process the threads without which a worker cannot run."""


class ThreadEndedError(OutboxError):
    """A thread without which a worker cannot run has ended."""


class OverdueError(OutboxError):
    """A handler runs past its time limit and a grace, and only the end of the process can end it."""
