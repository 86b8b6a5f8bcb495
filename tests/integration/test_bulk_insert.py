"""After a bulk insert without ANALYZE, sessions whose plans are for a small table stay fast."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from outbox.queries import query
from outbox.runtime import postgres
from tests.conftest import Connection
from tests.support.processes import add_users
from tests.support.statements import STATEMENTS

pytestmark = pytest.mark.once

ROWS = 200_000
BATCH = 1000
"""Rows per statement: the most that a worker claims or completes at once."""
LIMIT = 1.0
"""Seconds per statement. With a plan that finds rows by their ids, each takes less than a tenth of a second."""
WARM_UP = 12
"""Executions per statement, of one row each. psycopg prepares the sixth; five later, Postgres makes a generic plan and
uses it whenever a custom plan costs more, as it does for the first large batch."""

_OPEN_VERIFICATIONS = "open_verifications"
_STARTING = {"publish", "claim"}
_ENDING = {"complete", "rescue"}
"""Statements that end an attempt: each needs its own rows."""


@pytest.fixture(params=[False, True], ids=["prepared", "pooled"])
def session(request: pytest.FixtureRequest, database_url: str) -> Iterator[Connection]:
    """A session as relay and worker use it: with prepared statements, or without them as behind a pooler."""
    with ExitStack() as stack:
        yield stack.enter_context(postgres.connect(database_url, "test session", pooled=request.param))


def _parameters(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a statement's parameters for these rows, with one element per row in every array."""
    if name == _OPEN_VERIFICATIONS:
        usernames = [json.loads(row["payload"])["username"] for row in rows]
        return {"outbox_ids": [row["id"] for row in rows], "usernames": usernames, "lifetime": 900.0}
    parameters = {
        key: value[:1] * len(rows) if isinstance(value, list) and key != "queues" else value
        for key, value in STATEMENTS[name].items()
    }
    if "ids" in parameters:
        parameters |= {"ids": [row["id"] for row in rows]}
    if "deliveries" in parameters:
        parameters |= {"deliveries": [row["delivery"] for row in rows]}
    if name == "publish":
        parameters |= {"queue": "critical", "batch": BATCH}
    return parameters


def _execute_timed(session: Connection, name: str, rows: list[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    """Executes a statement and returns its duration in seconds and its rows."""
    start = time.monotonic()
    cursor = session.execute(query(name), _parameters(name, rows))
    rows_found = cursor.fetchall() if cursor.description else []
    return time.monotonic() - start, rows_found


def _run_all(session: Connection) -> dict[str, float]:
    """Executes every statement of relay, worker and `outbox dead` on some rows; returns the seconds of each.

    Nothing is rolled back: psycopg drops its prepared statements at a rollback.
    """
    seconds = {}
    others = {*STATEMENTS, _OPEN_VERIFICATIONS}.difference(_STARTING, _ENDING)
    for ending in _ENDING & STATEMENTS.keys():
        seconds["publish"], rows = _execute_timed(session, "publish", [])
        seconds["claim"], claims = _execute_timed(session, "claim", rows)
        assert len(claims) == len(rows)
        for name in sorted(others):
            seconds[name], _ = _execute_timed(session, name, claims)
        seconds[ending], _ = _execute_timed(session, ending, claims)
    return seconds


def test_every_statement_stays_fast_after_a_bulk_insert(connection: Connection, session: Connection) -> None:
    """A plan that was made for a few rows is not used for 200,000."""
    for number in range(WARM_UP):
        add_users(connection, [f"early_{number}"])
        _run_all(session)
    add_users(connection, [f"user_{n}" for n in range(ROWS)])

    rounds = [_run_all(session) for _ in range(3)]

    # The minimum: a bad plan is slow every time, a busy disk is not.
    fastest = {name: round(min(seconds[name] for seconds in rounds), 2) for name in rounds[0]}
    assert {name: seconds for name, seconds in fastest.items() if seconds > LIMIT} == {}
