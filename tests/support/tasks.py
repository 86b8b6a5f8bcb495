"""Tasks of the tests, and their handlers: `OUTBOX_HANDLERS=tests.support.tasks`."""

import os
import signal
import time

from pydantic import BaseModel

from outbox import Context, Task, handler


class Nothing(BaseModel):
    """A payload of nothing."""


RETURN = Task("return", Nothing)
PAUSE = Task("pause", Nothing)
KILL_THE_WORKER = Task("kill_the_worker", Nothing)


@handler(RETURN)
def return_(payload: Nothing, context: Context) -> None:
    """Is done at once."""


@handler(PAUSE)
def pause(payload: Nothing, context: Context) -> None:
    """Takes half a second."""
    time.sleep(0.5)


@handler(KILL_THE_WORKER)
def kill_the_worker(payload: Nothing, context: Context) -> None:
    """Ends its own process as the kernel would that runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
