"""Attempts that tests make without a worker."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from psycopg_pool import ConnectionPool
from pydantic import BaseModel

from outbox import Handler, Task
from outbox.context import Context
from outbox.rq_jobs import Delivery
from outbox.runtime.settings import WorkerSettings
from outbox_worker.attempt import attempt
from outbox_worker.claim import Claim
from outbox_worker.outcome import Outcome


@dataclass(frozen=True)
class KnownContext(Context):
    """A context with the settings of its worker, which handlers do not see."""

    settings: WorkerSettings


class Note(BaseModel):
    """A payload."""

    text: str = ""


NOTED = Task("noted", Note)

Function = Callable[[Note, Context], Mapping[str, object] | None]


def context_without_servers() -> Context:
    """Returns a context for handlers that need no server."""
    pool: ConnectionPool[Any] = ConnectionPool("postgresql://nowhere/none", min_size=0, max_size=1, open=False)
    return Context(row_id=1, attempt=1, deadline=time.monotonic() + 30, database=pool, send=lambda _: None)


def claim_of(**changes: Any) -> Claim:
    """Returns a claim of a row that no database has."""
    values: dict[str, Any] = {
        "delivery": Delivery(1, 1),
        "task": "noted",
        "payload": '{"text": "hello"}',
        "queue": "default",
        "attempt": 1,
        "max_retries": 3,
        "timeout": 30,
        "request_id": None,
    }
    return Claim(**{**values, **changes})


def try_once(function: Function, context: Context, **changes: Any) -> Outcome:
    """Makes one attempt at a row with a handler, logs it, and returns its outcome."""
    outcome, report = attempt(claim_of(**changes), {"noted": Handler(NOTED, function)}, context, 3600)
    if report is not None:
        report()
    return outcome


def raising(error: BaseException) -> Function:
    """Returns a handler that raises an error."""

    def function(payload: Note, context: Context) -> NoReturn:
        raise error

    return function
