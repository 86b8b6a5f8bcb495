"""The handler for large payloads that the chaos run adds to its workers: it checks the payload and logs its run."""

import hashlib
import os
import time
from pathlib import Path

from pydantic import BaseModel

from outbox import Context, Task, handler

_WORKER, _RUNS = "CHAOS_WORKER", "CHAOS_RUNS"


class Large(BaseModel):
    """A payload of any size, and its checksum."""

    text: str
    md5: str


TAKE_LARGE_PAYLOAD = Task("take_large_payload", Large)


def runs_file(folder: Path) -> Path:
    """Returns the file to which the handlers of a run write."""
    return folder / "runs.log"


def environment(worker: int, folder: Path) -> dict[str, str]:
    """Returns the environment in which a worker finds the handler, and the handler its file.

    Args:
        worker: the number of its slot.
        folder: the folder of the run.
    """
    return {"OUTBOX_HANDLERS": __name__, _WORKER: str(worker), _RUNS: str(runs_file(folder))}


@handler(TAKE_LARGE_PAYLOAD)
def take_large_payload(payload: Large, context: Context) -> None:
    """Writes its row, its worker and the time, in one write that a kill cannot split."""
    if hashlib.md5(payload.text.encode(), usedforsecurity=False).hexdigest() != payload.md5:
        raise ValueError("the payload is not what was added")
    with Path(os.environ[_RUNS]).open("a") as file:
        file.write(f"{context.row_id} {os.environ[_WORKER]} {time.time()}\n")
