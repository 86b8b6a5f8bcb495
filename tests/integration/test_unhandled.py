"""Rows that one worker cannot handle and another may, during a rolling deploy and after it."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from structlog.testing import capture_logs

from outbox import Context, Handler, Task
from outbox.rq_jobs import Delivery
from outbox_worker.attempt import attempt
from outbox_worker.claim import claim
from outbox_worker.complete import Completer
from outbox_worker.outcome import Outcome
from outbox_worker.pace import Pace
from outbox_worker.registry import Registry
from tests.conftest import Connection
from tests.support.processes import QUICK, Stack
from tests.support.rows import add_row
from tests.support.waiting import eventually

OLD = """
from pydantic import BaseModel
from outbox import Context, Task, handler

class Note(BaseModel):
    text: str

@handler(Task("noted", Note))
def noted(payload: Note, context: Context) -> None:
    pass
"""
NEW = f"""{OLD.replace("text: str", "text: str | int")}
@handler(Task("brand_new", Note))
def brand_new(payload: Note, context: Context) -> None:
    pass
"""


class Note(BaseModel):
    """A payload as it was before the deploy."""

    text: str


NOTED = Task("noted", Note)
GRACE = 100.0
"""Seconds."""
MANY = Task("noted_by_many", Note)
REGISTRY: Registry = {task.name: Handler(task, lambda *_: None) for task in (NOTED, MANY)}


def handle_once(
    connection: Connection, completer: Completer, context: Context, delivery: Delivery, grace: float = GRACE
) -> Outcome:
    """Hands a row over, makes an attempt at it, writes the outcome and returns it."""
    connection.execute("UPDATE outbox SET status = 'enqueued', run_at = now() WHERE id = %s", [delivery.row_id])
    (claimed,) = claim(connection, [delivery], "me", 15)
    outcome, report = attempt(claimed, REGISTRY, context, grace)
    if report is not None:
        report()
    completer.in_flight.put(outcome)
    status = "SELECT FROM outbox WHERE id = %s AND status = %s"
    eventually(lambda: connection.execute(status, [delivery.row_id, outcome.status]).fetchall(), 10, "it is written")
    return outcome


def age(connection: Connection, delivery: Delivery, seconds: float) -> None:
    """Moves the time at which a row was first given back into the past."""
    connection.execute(
        "UPDATE outbox SET unhandled_since = unhandled_since - make_interval(secs => %s) WHERE id = %s",
        [seconds, delivery.row_id],
    )


def unhandled_since(connection: Connection, delivery: Delivery) -> Any:
    """Returns when the row was first given back; None if a worker has handled it since."""
    row = connection.execute("SELECT unhandled_since FROM outbox WHERE id = %s", [delivery.row_id]).fetchone()
    assert row is not None
    return row["unhandled_since"]


CASES = [
    pytest.param(("brand_new", '{"text": "private"}'), "no handler for task 'brand_new'", id="an unknown task"),
    pytest.param(("noted", '{"text": ["private"]}'), "noted does not fit: text: string_type", id="another type"),
    pytest.param(("noted", '{"private": 1}'), "noted does not fit: text: missing", id="a missing field"),
    pytest.param(("noted", '{"text": %s}' % ("9" * 5000)), "noted does not fit: payload: json_invalid", id="digits"),
    pytest.param(("noted", '{"text": %s}' % ("[" * 3000 + "]" * 3000)), "payload: json_invalid", id="nested"),
]


@pytest.mark.parametrize(("row", "error"), CASES)
def test_an_unhandled_row_is_retried_for_a_grace_and_then_dead(
    connection: Connection, completer: Completer, context: Context, row: tuple[str, str], error: str
) -> None:
    """No attempt counts, the delay grows with the time, and the error names the field and no value."""
    delivery = add_row(connection, task=row[0], payload=row[1], max_retries=0)
    delays = []
    for seconds in (0, 8, 80):
        outcome = handle_once(connection, completer, context, delivery)
        assert (outcome.status, outcome.attempts) == ("pending", 0)
        delays.append(outcome.delay)
        first = unhandled_since(connection, delivery)
        age(connection, delivery, seconds)
    assert first
    assert 0 < delays[0] < 1, "another worker may claim it soon"
    assert delays[2] < 15

    age(connection, delivery, 100)
    with capture_logs() as lines:
        outcome = handle_once(connection, completer, context, delivery)
    assert (outcome.status, outcome.attempts) == ("dead", 0)
    assert error in str(outcome.error)
    assert "private" not in str(outcome.error)
    assert [(line["event"], line["next_try"]) for line in lines] == [("process task failed", None)]
    assert unhandled_since(connection, delivery) is None, "an operator's retry gets the full grace again"


def test_the_grace_is_reset_once_a_worker_has_handled_the_row(
    connection: Connection, completer: Completer, context: Context
) -> None:
    """The next time that no worker can handle the row, it has the full grace."""
    delivery = add_row(connection, task="noted", payload='{"text": 1}')
    handle_once(connection, completer, context, delivery)
    assert unhandled_since(connection, delivery)
    connection.execute('UPDATE outbox SET payload = \'{"text": "fits"}\'')
    assert handle_once(connection, completer, context, delivery).status == "done"
    assert unhandled_since(connection, delivery) is None


def test_without_a_grace_an_unhandled_row_is_dead_at_once(
    connection: Connection, completer: Completer, context: Context
) -> None:
    """This suits deployments that never run two versions at the same time."""
    delivery = add_row(connection, task="noted", payload='{"text": 1}')
    assert handle_once(connection, completer, context, delivery, grace=0.0).status == "dead"


def test_many_unhandled_rows_are_logged_once_and_spread_over_time(
    connection: Connection, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line per task and reason in a minute, from all threads; some rows are due soon, the rest later."""
    monkeypatch.setattr("outbox_worker.attempt._unhandled_pace", Pace(rate=20, longest=15))
    delays = []
    rows = [add_row(connection, task=f"unheard_of_{n % 2}") for n in range(200)]
    rows += [add_row(connection, task="noted_by_many", payload='{"text": null}') for _ in range(100)]
    claims = claim(connection, rows, "me", 60)
    with capture_logs() as lines, ThreadPoolExecutor(8) as threads:
        for attempted in threads.map(lambda claimed: attempt(claimed, REGISTRY, context, GRACE), claims):
            delays.append(attempted.outcome.delay)
            if attempted.report is not None:
                attempted.report()
    assert min(delays) < 1
    assert max(delays) > 5, "other rows do not wait for them"
    assert sorted((line["event"], line["times"]) for line in lines) == [
        ("payload does not fit its model", 1),
        ("task is unknown to this worker", 1),
        ("task is unknown to this worker", 1),
    ]


@pytest.mark.unmeasured
def test_in_a_rolling_deploy_the_new_worker_handles_new_rows_soon(
    stack: Stack, connection: Connection, tmp_path: Path
) -> None:
    """Rows of a new task and of a new payload are done beside an old worker, without waits of 15 s."""
    (tmp_path / "old_handlers.py").write_text(OLD)
    (tmp_path / "new_handlers.py").write_text(NEW)
    path = os.pathsep.join([str(tmp_path), str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    stack.environment |= {**QUICK, "PYTHONPATH": path}
    old, new, _ = [
        stack.start("worker", OUTBOX_HANDLERS="old_handlers"),
        stack.start("worker", OUTBOX_HANDLERS="new_handlers"),
        stack.start("relay"),
    ]
    old.await_event("started")
    new.await_event("started")
    for number in range(20):
        task, text = ("brand_new", '"new"') if number % 2 else ("noted", "1")
        connection.execute(
            "INSERT INTO outbox (task, payload, max_retries) VALUES (%s, %s, 0)", [task, f'{{"text": {text}}}']
        )
    undone = "SELECT id, status, last_error FROM outbox WHERE status <> 'done'"
    eventually(lambda: not connection.execute(undone).fetchall(), 45, "all rows are done")
    assert connection.execute("SELECT max(attempts) AS attempts FROM outbox").fetchone() == {"attempts": 1}
    assert len(old.events("task is unknown to this worker")) <= 1
    assert len(old.events("payload does not fit its model")) <= 1
