"""What a handler is given besides its payload."""

from collections.abc import Callable
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any

from psycopg_pool import ConnectionPool

from outbox.message import Message
from outbox.settings import WorkerSettings


@dataclass(frozen=True)
class Context:
    """One attempt at one row, and what the worker lends for it."""

    row: int
    """The outbox row's id: the same at every attempt, so whatever is derived from it is too."""
    attempt: int
    """1 at the first attempt."""
    database: ConnectionPool[Any]
    """Connections for short transactions; a statement may take 20 s. Hold none while talking to the outside."""
    send: Callable[[EmailMessage | Message], None]
    """Sends a mail; raises SkipRetry where the server refuses the recipient for good."""
    settings: WorkerSettings
