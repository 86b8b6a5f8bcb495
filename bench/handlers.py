"""Handlers of the bench: `OUTBOX_HANDLERS=bench.handlers`."""

import time

from pydantic import BaseModel

from bench.peers.functions import NAP
from outbox import Context, Task, handler


class Nothing(BaseModel):
    """A payload of nothing."""


NOOP = Task("bench_noop", Nothing)
SLEEP = Task("bench_sleep", Nothing)


@handler(NOOP)
def noop(payload: Nothing, context: Context) -> None:
    """Is done at once."""


@handler(SLEEP)
def sleep(payload: Nothing, context: Context) -> None:  # noqa: ARG001
    """Waits for something outside."""
    time.sleep(NAP)
