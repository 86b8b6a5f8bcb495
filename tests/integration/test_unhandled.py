"""Rows that a worker cannot handle, and another may: what happens to them during a rolling deploy and after it."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from structlog.testing import capture_logs

from outbox import Context, Handler, Task
from outbox.rq_jobs import Delivery
from outbox.runtime.settings import WorkerSettings
from outbox_worker.attempt import attempt
from outbox_worker.claim import claim
from outbox_worker.complete import Completer
from outbox_worker.database import HandlerPool
from outbox_worker.in_flight import InFlight
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


@pytest.fixture
def context(worker_settings: WorkerSettings) -> Context:
    """What handlers are given; these need none of it."""
    pool = HandlerPool(worker_settings.database_url)
    return Context(row_id=1, attempt=1, deadline=float("inf"), database=pool, send=lambda _: None)


@pytest.fixture
def completer(database_url: str) -> Iterator[Completer]:
    """What writes outcomes."""
    opened = Completer(database_url, InFlight(), "me", 15)
    opened.start()
    yield opened
    opened.close(5)


def tried(
    connection: Connection, completer: Completer, context: Context, delivery: Delivery, grace: float = GRACE
) -> Outcome:
    """Hands a row over, makes an attempt at it as a worker does, and writes the outcome."""
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
    """Lets so many seconds have passed since no worker could handle a row."""
    connection.execute(
        "UPDATE outbox SET unhandled_since = unhandled_since - make_interval(secs => %s) WHERE id = %s",
        [seconds, delivery.row_id],
    )


def unhandled_since(connection: Connection, delivery: Delivery) -> Any:
    """Returns what the row says."""
    found = connection.execute("SELECT unhandled_since FROM outbox WHERE id = %s", [delivery.row_id]).fetchone()
    assert found is not None
    return found["unhandled_since"]


CASES = [
    pytest.param(("brand_new", '{"text": "private"}'), "no handler for task 'brand_new'", id="an unknown task"),
    pytest.param(("noted", '{"text": ["private"]}'), "noted does not fit: text: string_type", id="another type"),
    pytest.param(("noted", '{"private": 1}'), "noted does not fit: text: missing", id="a missing field"),
    pytest.param(("noted", '{"text": %s}' % ("9" * 5000)), "noted does not fit: payload: json_invalid", id="digits"),
    pytest.param(("noted", '{"text": %s}' % ("[" * 3000 + "]" * 3000)), "payload: json_invalid", id="nested"),
]


@pytest.mark.parametrize(("row", "error"), CASES)
def test_it_is_offered_again_for_a_grace_and_then_dead(
    connection: Connection, completer: Completer, context: Context, row: tuple[str, str], error: str
) -> None:
    """No attempt counts, the delay grows with the time, and the error names the field and no value."""
    delivery = add_row(connection, task=row[0], payload=row[1], max_retries=0)
    delays = []
    for seconds in (0, 8, 80):
        outcome = tried(connection, completer, context, delivery)
        assert (outcome.status, outcome.attempts) == ("pending", 0)
        delays.append(outcome.delay)
        first = unhandled_since(connection, delivery)
        age(connection, delivery, seconds)
    assert first
    assert 0 < delays[0] < 1, "another worker has it at once"
    assert delays[2] < 15

    age(connection, delivery, 100)
    with capture_logs() as lines:
        outcome = tried(connection, completer, context, delivery)
    assert (outcome.status, outcome.attempts) == ("dead", 0)
    assert error in str(outcome.error)
    assert "private" not in str(outcome.error)
    assert [(line["event"], line["next_try"]) for line in lines] == [("process task failed", None)]
    assert unhandled_since(connection, delivery) is None, "an operator's retry gets the full grace again"


def test_the_grace_begins_anew_once_a_worker_has_handled_it(
    connection: Connection, completer: Completer, context: Context
) -> None:
    """A row that a handler has tried is no longer one that nobody can handle."""
    delivery = add_row(connection, task="noted", payload='{"text": 1}')
    tried(connection, completer, context, delivery)
    assert unhandled_since(connection, delivery)
    connection.execute('UPDATE outbox SET payload = \'{"text": "fits"}\'')
    assert tried(connection, completer, context, delivery).status == "done"
    assert unhandled_since(connection, delivery) is None


def test_a_grace_of_nothing_gives_it_up_at_once(connection: Connection, completer: Completer, context: Context) -> None:
    """For those who never run two versions side by side."""
    delivery = add_row(connection, task="noted", payload='{"text": 1}')
    assert tried(connection, completer, context, delivery, grace=0.0).status == "dead"


def test_many_rows_are_one_line_and_no_flood(
    connection: Connection, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error per task and reason in a minute, from whatever thread; a part is offered at once, the rest later."""
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
    assert max(delays) > 5, "so that others are not kept waiting"
    assert sorted((line["event"], line["times"]) for line in lines) == [
        ("payload does not fit its model", 1),
        ("task is unknown to this worker", 1),
        ("task is unknown to this worker", 1),
    ]


@pytest.mark.unmeasured
def test_in_a_rolling_deploy_the_right_worker_gets_it_soon(
    stack: Stack, connection: Connection, tmp_path: Path
) -> None:
    """Beside a worker that knows neither, rows of a new task and a new payload are done: not in steps of 15 s."""
    (tmp_path / "old_handlers.py").write_text(OLD)
    (tmp_path / "new_handlers.py").write_text(NEW)
    stack.environment |= {**QUICK, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())])}
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
