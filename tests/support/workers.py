"""Workers that tests start as a process or run in a thread."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from outbox import Context, Handler, Task
from outbox.rq_jobs import Delivery
from outbox.runtime.settings import WorkerSettings
from outbox.runtime.stop import Stop
from outbox_worker.worker import Worker
from tests.conftest import Connection
from tests.support.processes import Process, Stack
from tests.support.rows import add_row, offer, read_row
from tests.support.tasks import Nothing
from tests.support.waiting import eventually


def is_done(connection: Connection, delivery: Delivery) -> bool:
    """Returns whether the row is done."""
    return bool(read_row(connection, delivery)["status"] == "done")


def start_with_running_handler(
    stack: Stack,
    connection: Connection,
    client: redis.Redis,
    *,
    module: str = "worker",
    does: str = "waits",
    **environment: str,
) -> tuple[Process, Delivery, Path]:
    """Starts a worker and a handler that waits.

    Returns:
        The process, the row, and the file on which a handler that `waits` ends.
    """
    flag = stack.folder / "begun"
    delivery = add_row(connection, payload=f'{{"does": "{does}", "path": "{flag}"}}')
    offer(client, delivery.job_id)
    worker = stack.run(module, **environment)
    eventually(flag.exists, 10, "the handler has begun")
    return worker, delivery, flag.with_name("begun.go")


def worker_with(settings: WorkerSettings, function: Callable[[Nothing, Context], None], concurrency: int = 2) -> Worker:
    """Returns a worker that handles the task `called` with a function."""
    settings = settings.model_copy(update={"concurrency": concurrency})
    return Worker(settings, {"called": Handler(Task("called", Nothing), function)}, Stop())


def waiting_for(may_end: threading.Event) -> Callable[[Nothing, Context], None]:
    """Returns a handler that ends when it may."""

    def wait(_: Nothing, __: Context) -> None:
        may_end.wait(30)

    return wait


@contextmanager
def working(worker: Worker) -> Iterator[None]:
    """Runs a worker's loop in a thread; stops the worker at the end."""
    thread = threading.Thread(target=worker._work)
    thread.start()
    try:
        yield
    finally:
        worker._stop.request()
        thread.join(10)
        worker._finish()
