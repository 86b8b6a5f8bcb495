"""Claims that tests make in the name of one worker."""

from outbox_worker.claim import Claim, claim
from tests.conftest import Connection
from tests.support.rows import add_row


def claim_rows(connection: Connection, count: int = 1) -> list[Claim]:
    """Adds rows and claims them for the worker `me`, with leases of one second."""
    return claim(connection, [add_row(connection) for _ in range(count)], "me", 1)
