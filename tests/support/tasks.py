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
SLEEP_IN_POSTGRES = Task("sleep_in_postgres", Nothing)


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


@handler(SLEEP_IN_POSTGRES)
def sleep_in_postgres(payload: Nothing, context: Context) -> None:
    """Waits for a statement that takes ten minutes."""
    with context.database.connection() as connection:
        connection.execute("SELECT pg_sleep(600)")
