"""A task of one's own: one definition, one function, and OUTBOX_HANDLERS."""

import os
import sys
from pathlib import Path

import pytest

import outbox
from tests.conftest import Connection
from tests.support.processes import Stack
from tests.support.waiting import eventually

MODULE = """
from pydantic import BaseModel

from outbox import Context, Task, handler


class Greeting(BaseModel):
    name: str


GREET = Task("greet", Greeting, max_retries=3)


@handler(GREET)
def greet(payload: Greeting, context: Context) -> dict[str, object]:
    return {"greeted": f"{payload.name}, row {context.row}, attempt {context.attempt}"}
"""


def test_a_second_task(stack: Stack, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that the project does not know is all it takes: its row is handed over and handled."""
    (tmp_path / "greetings.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import greetings  # type: ignore[import-not-found]

    path = os.pathsep.join([str(tmp_path), str(Path.cwd())])
    worker, _ = stack.run_all("worker", "relay", OUTBOX_HANDLERS="greetings", PYTHONPATH=path)
    with connection.transaction():
        row = outbox.add(connection, greetings.GREET, {"name": "Ada"})
    assert row is not None
    (line,) = eventually(lambda: worker.events("processed task"), 10, "the greeting")
    assert line["greeted"] == f"Ada, row {row}, attempt 1"
    assert line["type"] == "greet"
    eventually(
        lambda: (
            connection.execute("SELECT status, queue, max_retries FROM outbox").fetchall()
            == [{"status": "done", "queue": "default", "max_retries": 3}]
        )
    )
    sys.modules.pop("greetings")
