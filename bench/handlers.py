"""Handlers of the bench: `OUTBOX_HANDLERS=bench.handlers`."""

import time

from pydantic import BaseModel

from bench.peers.functions import SLEEP_SECONDS
from outbox import Context, Task, handler


class Empty(BaseModel):
    """An empty payload."""


NOOP = Task("bench_noop", Empty)
SLEEP = Task("bench_sleep", Empty)


@handler(NOOP)
def noop(payload: Empty, context: Context) -> None:
    """Does nothing."""


@handler(SLEEP)
def sleep(payload: Empty, context: Context) -> None:  # noqa: ARG001
    """Waits, as a call to another server would."""
    time.sleep(SLEEP_SECONDS)
