"""A bulk insert into a table that nobody has analysed since: sessions that planned for a small table stay quick."""

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
"""Rows per statement: as many as a worker claims and marks at most."""
LIMIT = 1.0
"""Seconds. With a plan that finds rows by their ids every statement takes less than a tenth of a second."""
WARM_UP = 12
"""Executions per statement, of one row each: psycopg prepares the sixth, and five later Postgres makes a plan for any
parameters. From then on it uses that one wherever the plans for given ones cost more: for the first large batch's."""

_OPEN_VERIFICATIONS = "open_verifications"
_CLAIMING = {"publish", "claim"}
_ENDING = {"complete", "rescue"}
"""What ends an attempt: each needs rows of its own."""


@pytest.fixture(params=[False, True], ids=["prepared", "pooled"])
def session(request: pytest.FixtureRequest, database_url: str) -> Iterator[Connection]:
    """A session of relay and worker: prepared as its own, or unprepared as behind a pooler."""
    with ExitStack() as stack:
        yield stack.enter_context(postgres.connect(database_url, "test session", pooled=request.param))


def _parameters(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a statement's parameters for these rows, with every array as long as there are rows."""
    if name == _OPEN_VERIFICATIONS:
        usernames = [json.loads(row["payload"])["username"] for row in rows]
        return {"outbox_ids": [row["id"] for row in rows], "usernames": usernames, "lifetime": 900.0}
    fitted = {
        key: value[:1] * len(rows) if isinstance(value, list) and key != "queues" else value
        for key, value in STATEMENTS[name].items()
    }
    if "ids" in fitted:
        fitted |= {"ids": [row["id"] for row in rows]}
    if "deliveries" in fitted:
        fitted |= {"deliveries": [row["delivery"] for row in rows]}
    if name == "publish":
        fitted |= {"queue": "critical", "batch": BATCH}
    return fitted


def _timed(session: Connection, name: str, rows: list[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    """Executes a statement and returns the seconds that it took and its rows."""
    begun = time.monotonic()
    cursor = session.execute(query(name), _parameters(name, rows))
    found = cursor.fetchall() if cursor.description else []
    return time.monotonic() - begun, found


def _round(session: Connection) -> dict[str, float]:
    """Executes every statement of relay, worker and `outbox dead` as rows go by; returns the seconds of each.

    Nothing is rolled back: with that, psycopg forgets all that it has prepared.
    """
    seconds = {}
    harmless = {*STATEMENTS, _OPEN_VERIFICATIONS}.difference(_CLAIMING, _ENDING)
    for ending in _ENDING & STATEMENTS.keys():
        seconds["publish"], rows = _timed(session, "publish", [])
        seconds["claim"], claims = _timed(session, "claim", rows)
        assert len(claims) == len(rows)
        for name in sorted(harmless):
            seconds[name], _ = _timed(session, name, claims)
        seconds[ending], _ = _timed(session, ending, claims)
    return seconds


def test_every_statement_stays_quick_after_a_bulk_insert(connection: Connection, session: Connection) -> None:
    """A plan that was made for a table of a few rows is not used on one of 200,000."""
    for number in range(WARM_UP):
        add_users(connection, [f"early_{number}"])
        _round(session)
    add_users(connection, [f"user_{n}" for n in range(ROWS)])

    rounds = [_round(session) for _ in range(3)]

    # The best of them: a bad plan is slow every time, a busy disk is not.
    quickest = {name: round(min(each[name] for each in rounds), 2) for name in rounds[0]}
    assert {name: seconds for name, seconds in quickest.items() if seconds > LIMIT} == {}
