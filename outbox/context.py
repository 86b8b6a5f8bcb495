"""What a handler is given besides its payload."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any

from psycopg_pool import ConnectionPool

from outbox.message import Message


@dataclass(frozen=True)
class Context:
    """One attempt at one row, and what the worker lends for it. It has no settings: no handler gets a password."""

    row_id: int
    """The outbox row's id: the same at every attempt, so whatever is derived from it is too."""
    attempt: int
    """1 at the first attempt."""
    deadline: float
    """When the attempt's time is over, in seconds of the monotonic clock."""
    database: ConnectionPool[Any]
    """Connections for short transactions: a block of `connection()` is one. A statement may take 20 s, or what the
    attempt has left, but at least 1 s: to commit. Hold none while talking to the outside. Where none
    is to be had in 10 s, let the `PoolTimeout` through: the row is given back, and the attempt does not count."""
    send: Callable[[EmailMessage | Message], None]
    """Sends a mail; raises SkipRetry where the server says that the mailbox will never do."""

    @property
    def remaining(self) -> float:
        """The seconds that the attempt has left, 0 at the least.

        Nothing interrupts a handler: one that talks to the outside takes this as its time-out there.
        """
        return max(0.0, self.deadline - time.monotonic())
