"""The handler that the chaos run gives its workers: it takes a large payload, and writes down that it ran."""

import hashlib
import os
import time
from pathlib import Path

from pydantic import BaseModel

from outbox import Context, Task, handler

_WORKER, _RUNS = "CHAOS_WORKER", "CHAOS_RUNS"


class Large(BaseModel):
    """A payload of any size, and what shows that it is whole."""

    text: str
    md5: str


TAKE_LARGE_PAYLOAD = Task("take_large_payload", Large)


def runs_file(folder: Path) -> Path:
    """Returns where a run's handlers write."""
    return folder / "runs.log"


def environment(worker: int, folder: Path) -> dict[str, str]:
    """Returns what a worker needs to find the handler, and the handler to write.

    Args:
        worker: the number of its slot.
        folder: the run's.
    """
    return {"OUTBOX_HANDLERS": __name__, _WORKER: str(worker), _RUNS: str(runs_file(folder))}


@handler(TAKE_LARGE_PAYLOAD)
def take_large_payload(payload: Large, context: Context) -> None:
    """Writes down its row, its worker and the time, in one write that no kill can cut."""
    if hashlib.md5(payload.text.encode(), usedforsecurity=False).hexdigest() != payload.md5:
        raise ValueError("the payload is not what was added")
    with Path(os.environ[_RUNS]).open("a") as file:
        file.write(f"{context.row_id} {os.environ[_WORKER]} {time.time()}\n")
