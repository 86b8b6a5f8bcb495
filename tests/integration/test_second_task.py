"""A custom task needs one definition, one function, and OUTBOX_HANDLERS."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import outbox
from tests.conftest import Connection
from tests.support.processes import Stack
from tests.support.waiting import eventually

GREETINGS_MODULE = """
from pydantic import BaseModel

from outbox import Context, Task, handler


class Greeting(BaseModel):
    name: str


GREET = Task("greet", Greeting, max_retries=3)


@handler(GREET)
def greet(payload: Greeting, context: Context) -> dict[str, object]:
    return {"greeted": f"{payload.name}, row {context.row_id}, attempt {context.attempt}"}
"""


def test_a_second_task(stack: Stack, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a task from a module outside of the project is handed over and handled."""
    (tmp_path / "greetings.py").write_text(GREETINGS_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import greetings  # type: ignore[import-not-found]

    path = os.pathsep.join([str(tmp_path), str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
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


def test_the_example_of_the_readme(stack: Stack, database_url: str, tmp_path: Path) -> None:
    """Its three files work as they are written, except for the shortened delay: the row is handled."""
    page = Path("README.md").read_text(encoding="utf-8")
    files = re.findall(r"```python\n# (greetings/\w+\.py)\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in files] == ["greetings/tasks.py", "greetings/handlers.py", "greetings/add.py"]
    (tmp_path / "greetings").mkdir()
    for name, text in [("greetings/__init__.py", ""), *files]:
        (tmp_path / name).write_text(text.replace("delay=5", "delay=0"))
    path = os.pathsep.join([str(tmp_path), str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])

    worker, _ = stack.run_all("worker", "relay", OUTBOX_HANDLERS="greetings.handlers", PYTHONPATH=path)
    environment = {**os.environ, "DATABASE_URL": database_url, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-m", "greetings.add"], env=environment, check=True, timeout=30)

    (line,) = eventually(lambda: worker.events("processed task"), 10, "the greeting")
    assert line["type"] == "send_greeting"
    assert line["payload"] == {"username": "alice"}
