"""Plans of the statements of relay, worker and `outbox dead`: none scans 1,000,000 done rows."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from outbox.queries import query
from outbox.runtime import postgres
from tests.support.plans import MODES, plan_of
from tests.support.statements import STATEMENTS

pytestmark = pytest.mark.once

Connection = psycopg.Connection[dict[str, Any]]


INDEXES = [
    ("publish", "outbox_pending"),
    ("find_work", "outbox_pending"),
    ("unclaimed_rows", "outbox_enqueued"),
    ("expired_leases", "outbox_running"),
    ("rows_past_retention", "outbox_done"),
    ("unserved_queues", "outbox_pending"),
    ("unserved_queues", "outbox_enqueued"),
    ("count_dead", "outbox_dead"),
    ("dead_ids", "outbox_dead"),
]
"""The indexes that a statement needs, besides the primary key."""


@pytest.fixture(scope="module")
def history(create_database: Callable[[str | None], str], template: str) -> Iterator[Connection]:
    """1,000,000 done rows, 10,000 pending, 2,000 enqueued, 500 running, 200 dead, analysed."""
    with postgres.connect(create_database(template), "test", answer_limit=100) as connection:
        connection.execute("SET synchronous_commit = off")
        connection.execute(
            """
            INSERT INTO outbox (id, task, payload, status, delivery, done_at)
            OVERRIDING SYSTEM VALUE
            SELECT n, 't', '{}', 'done', 1, now() - interval '2 days' + n * interval '0.1 s'
            FROM generate_series(1, 1000000) AS n
            """
        )
        connection.execute(
            """
            INSERT INTO outbox (id, task, payload, queue, status, delivery, run_at, enqueued_at, lease_until)
            OVERRIDING SYSTEM VALUE
            SELECT n, 't', '{}', CASE WHEN n % 3 = 0 THEN 'critical' ELSE 'default' END, status, 1,
                   now() - make_interval(secs => n / 10), now() - interval '1 minute',
                   CASE WHEN status = 'running' THEN now() + make_interval(secs => n % 30) END
            FROM generate_series(1000001, 1012700) AS n,
                 LATERAL (SELECT CASE WHEN n <= 1010000 THEN 'pending' WHEN n <= 1012000 THEN 'enqueued'
                                      WHEN n <= 1012500 THEN 'running' ELSE 'dead' END AS status) AS s
            """
        )
        connection.execute("ANALYZE outbox")
        yield connection


def _scans_everything(nodes: list[dict[str, Any]]) -> bool:
    return any(node["Node Type"].endswith("Seq Scan") and node.get("Relation Name") == "outbox" for node in nodes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STATEMENTS)
def test_no_statement_scans_the_history(history: Connection, name: str, mode: str) -> None:
    """With 1,000,000 done rows every statement finds its rows by index, planned for its parameters or for any."""
    nodes = plan_of(history, name, STATEMENTS[name], mode)
    assert not _scans_everything(nodes), nodes
    used = {node["Index Name"] for node in nodes if node.get("Index Name", "").startswith("outbox_")}
    allowed = {"outbox_pkey", "outbox_pending", "outbox_enqueued", "outbox_running", "outbox_dead"}
    assert used <= (allowed | {"outbox_done"} if name == "rows_past_retention" else allowed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["publish", "find_work"])
def test_a_long_backlog_is_handed_over_by_index(connection: Connection, name: str, mode: str) -> None:
    """After a long outage most of the table may be pending; a batch is still found by index."""
    connection.execute("INSERT INTO outbox (task, payload) SELECT 't', '{}' FROM generate_series(1, 30000)")
    connection.execute("ANALYZE outbox")
    assert not _scans_everything(plan_of(connection, name, STATEMENTS[name], mode))


@pytest.mark.parametrize(("name", "index"), INDEXES)
def test_without_its_index_a_statement_scans_the_history(history: Connection, name: str, index: str) -> None:
    """Shows that the test above can fail: without the index, the plan is a sequential scan."""
    with history.transaction(force_rollback=True):
        history.execute(psycopg.sql.SQL("DROP INDEX {}").format(psycopg.sql.Identifier(index)))
        assert _scans_everything(plan_of(history, name, STATEMENTS[name], "force_custom_plan"))


def test_every_statement_on_the_outbox_has_a_plan_test() -> None:
    """A new statement of relay, worker or command must be added to STATEMENTS."""
    from pathlib import Path

    code = "".join(path.read_text() for folder in ("outbox", "relay", "worker") for path in Path(folder).rglob("*.py"))
    on_the_outbox = {
        name
        for name in re.findall(r'query\("(\w+)"\)', code)
        if re.search(r"\b(FROM|JOIN|UPDATE)\s+outbox\b", query(name))
    }
    assert on_the_outbox == set(STATEMENTS)
