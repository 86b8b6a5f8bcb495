"""Attempts at rows of verification mails, made without a worker's threads."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from outbox.rq_jobs import Delivery
from outbox.runtime.settings import WorkerSettings
from outbox_worker.attempt import attempt
from outbox_worker.claim import claim
from outbox_worker.database import HandlerPool
from outbox_worker.handlers import registry
from outbox_worker.mail import Mailer
from outbox_worker.outcome import Outcome
from tests.conftest import Connection
from tests.support.attempts import KnownContext
from tests.support.processes import add_users


@contextmanager
def context_of(worker_settings: WorkerSettings) -> Iterator[KnownContext]:
    """Yields a context for the handler, whose links are under a path of the service's host."""
    settings = worker_settings.model_copy(update={"public_url": "https://example.com/app"})
    mailer = Mailer(settings)
    with HandlerPool(settings.database_url) as pool:
        deadline = time.monotonic() + 60
        yield KnownContext(row_id=0, attempt=1, deadline=deadline, database=pool, send=mailer.send, settings=settings)
    mailer.close_idle(0)


def add_user(connection: Connection, name: str) -> int:
    """Creates a user, and returns the id of the first outbox row."""
    add_users(connection, [name])
    row = connection.execute("SELECT id FROM outbox").fetchone()
    assert row is not None
    return int(row["id"])


def attempt_row(connection: Connection, context: KnownContext, row_id: int) -> Outcome:
    """Makes one attempt at a row, whatever its state is."""
    connection.execute(
        "UPDATE outbox SET status = 'enqueued', delivery = 1, lease_until = NULL, run_at = now() WHERE id = %s",
        [row_id],
    )
    (claimed,) = claim(connection, [Delivery(row_id, 1)], "me", 60)
    own = replace(context, row_id=row_id, attempt=claimed.attempt)
    return attempt(claimed, registry(context.settings), own, 3600).outcome
