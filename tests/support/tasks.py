"""Tasks and handlers of the tests: `OUTBOX_HANDLERS=tests.support.tasks`."""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel

from outbox import Context, Task, handler
from tests.support.waiting import eventually


class Nothing(BaseModel):
    """A payload without fields."""


class Action(BaseModel):
    """What a handler of `noted` does before it returns."""

    does: str = "returns"
    path: str = ""
    """The file that a handler that waits creates when it begins."""


RETURN = Task("return", Nothing)
PAUSE = Task("pause", Nothing)
KILL_THE_WORKER = Task("kill_the_worker", Nothing)
SLEEP_IN_POSTGRES = Task("sleep_in_postgres", Nothing)
NOTED = Task("noted", Action)


@handler(RETURN)
def return_(payload: Nothing, context: Context) -> None:
    """Returns at once."""


@handler(PAUSE)
def pause(payload: Nothing, context: Context) -> None:
    """Takes half a second."""
    time.sleep(0.5)


@handler(KILL_THE_WORKER)
def kill_the_worker(payload: Nothing, context: Context) -> None:
    """Kills its own process, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


@handler(SLEEP_IN_POSTGRES)
def sleep_in_postgres(payload: Nothing, context: Context) -> None:
    """Runs a statement that takes ten minutes."""
    with context.database.connection() as connection:
        connection.execute("SELECT pg_sleep(600)")


@handler(NOTED)
def noted(payload: Action, context: Context) -> None:
    """Does what its payload says, and runs a statement."""
    if payload.does == "exits":
        sys.exit(1)
    if payload.does == "interrupts":
        raise KeyboardInterrupt
    if payload.does == "waits":
        Path(payload.path).touch()
        eventually(Path(f"{payload.path}.go").exists, 600)
    if payload.does == "waits for a thread":
        with ThreadPoolExecutor(1) as pool:
            Path(payload.path).touch()
            pool.submit(threading.Event().wait).result()
    with context.database.connection() as connection:
        connection.execute("SELECT 1")
