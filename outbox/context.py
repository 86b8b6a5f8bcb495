"""The context that a handler gets besides its payload."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any

from psycopg_pool import ConnectionPool

from outbox.message import Message


@dataclass(frozen=True)
class Context:
    """One attempt at one row, and what the worker lends to it. It has no settings, so no handler gets a password.

    Example:
        class Invoice(BaseModel):
            number: int

        INVOICE = Task("send_invoice", Invoice)

        @handler(INVOICE)
        def send_invoice(invoice: Invoice, context: Context) -> None:
            with context.database.connection() as connection:
                query = "SELECT address, text FROM invoices WHERE number = %s"
                address, text = connection.execute(query, [invoice.number]).fetchone() or ("", "")
            mail = EmailMessage()
            mail["To"], mail["Subject"] = address, f"Invoice {invoice.number}"
            mail.set_content(text)
            context.send(mail)
    """

    row_id: int
    """The outbox row's id. It is the same at every attempt, and so is everything derived from it."""
    attempt: int
    """1 at the first attempt."""
    deadline: float
    """End of the attempt's time, in seconds of the monotonic clock."""
    database: ConnectionPool[Any]
    """Connections for short transactions: a block of `connection()` is one. A statement may take 20 s, or the time that
    the attempt has left if that is shorter, but at least 1 s, so that it can commit. Hold no connection while talking
    to the outside. If none is free within 10 s, do not catch the `PoolTimeout`: the row is given back, and the attempt
    does not count."""
    send: Callable[[EmailMessage | Message], None]
    """Sends a mail; raises `SkipRetry` if the server says that the mailbox will never accept it."""

    @property
    def remaining(self) -> float:
        """The seconds that the attempt has left, at least 0.

        Nothing interrupts a handler: pass this as the time-out of each call to the outside.
        """
        return max(0.0, self.deadline - time.monotonic())
