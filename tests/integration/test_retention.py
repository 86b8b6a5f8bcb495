"""Old `done` rows are deleted, dead rows stay, and rows in unserved queues are logged."""

from typing import Any

import psycopg
from structlog.testing import capture_logs

from outbox.queries import query
from outbox.runtime.settings import RelaySettings
from outbox_relay.retention import BATCH, Retention
from outbox_relay.unserved_queues import warn_about_unserved_queues
from tests.support.plans import nodes

Connection = psycopg.Connection[dict[str, Any]]


def _done(connection: Connection, age: float, count: int = 1) -> None:
    connection.execute(
        "INSERT INTO outbox (task, payload, status, done_at)"
        " SELECT 't', '{}', 'done', now() - make_interval(secs => %s) FROM generate_series(1, %s)",
        [age, count],
    )


def _count(connection: Connection) -> int:
    row = connection.execute("SELECT count(*) AS rows FROM outbox").fetchone()
    assert row is not None
    return int(row["rows"])


def test_done_rows_go_after_the_retention_time(connection: Connection, relay_settings: RelaySettings) -> None:
    """The retention time counts from `done_at` and is that of the setting."""
    _done(connection, 86_401)
    _done(connection, 86_390)
    assert Retention(relay_settings).delete(connection) == 1
    assert Retention(relay_settings).delete(connection) == 0
    assert _count(connection) == 1
    assert Retention(relay_settings.model_copy(update={"retention": 60.0})).delete(connection) == 1


def test_other_rows_stay_however_old(connection: Connection, relay_settings: RelaySettings) -> None:
    """A dead row waits for an operator; pending, enqueued and running rows are work."""
    for status, lease in (("dead", None), ("pending", None), ("enqueued", None), ("running", "2000-01-01")):
        connection.execute(
            "INSERT INTO outbox (task, payload, status, created_at, run_at, enqueued_at, started_at, lease_until)"
            " VALUES ('t', '{}', %s, '2000-01-01', '2000-01-01', '2000-01-01', '2000-01-01', %s)",
            [status, lease],
        )
    assert Retention(relay_settings).delete(connection) == 0
    assert _count(connection) == 4


def test_history_goes_in_batches(connection: Connection, relay_settings: RelaySettings) -> None:
    """No statement deletes an unlimited number of rows."""
    _done(connection, 100_000, BATCH + 5)
    retention = Retention(relay_settings)
    assert [retention.delete(connection) for _ in range(3)] == [BATCH, 5, 0]


def test_pending_rows_in_an_unserved_queue_are_logged(connection: Connection, relay_settings: RelaySettings) -> None:
    """One line per queue with the number of rows; none if all queues are served, or their rows are finished."""
    connection.execute("INSERT INTO outbox (task, payload, queue) VALUES ('t', '{}', 'default')")
    connection.execute(
        "INSERT INTO outbox (task, payload, queue, status, done_at)"
        " VALUES ('t', '{}', 'bulk', 'dead', NULL), ('t', '{}', 'bulk', 'done', now())"
    )
    with capture_logs() as lines:
        warn_about_unserved_queues(connection, relay_settings)
    assert lines == []
    connection.execute("INSERT INTO outbox (task, payload, queue) SELECT 't', '{}', 'bulk' FROM generate_series(1, 3)")
    with capture_logs() as lines:
        warn_about_unserved_queues(connection, relay_settings)
    assert [(line["log_level"], line["queue"], line["rows"]) for line in lines] == [("error", "bulk", 3)]


def test_enqueued_rows_in_an_unserved_queue_are_logged_too(
    connection: Connection, relay_settings: RelaySettings
) -> None:
    """Their queue was removed from OUTBOX_QUEUES while Redis had its jobs: no sweep misses these."""
    connection.execute(
        "INSERT INTO outbox (task, payload, queue, status, delivery, enqueued_at)"
        " VALUES ('t', '{}', 'critical', 'enqueued', 1, now()), ('t', '{}', 'retired', 'enqueued', 1, now()),"
        " ('t', '{}', 'retired', 'enqueued', 1, now()), ('t', '{}', 'retired', 'pending', 0, NULL)"
    )
    with capture_logs() as lines:
        warn_about_unserved_queues(connection, relay_settings)
    assert [(line["log_level"], line["queue"], line["rows"]) for line in lines] == [("error", "retired", 3)]


def test_a_look_for_such_queues_does_not_read_the_backlog(
    connection: Connection, relay_settings: RelaySettings
) -> None:
    """Of 30,000 pending rows it reads one per served queue, and of an unserved queue as many as it counts."""
    connection.execute(
        "INSERT INTO outbox (task, payload, queue) SELECT 't', '{}', queue"
        " FROM generate_series(1, 10000), unnest(ARRAY['bulk', 'critical', 'default']) AS queue"
    )
    connection.execute("ANALYZE outbox")
    found = connection.execute(
        "EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) " + query("unserved_queues"),
        {"queues": list(relay_settings.queues), "most": 100},
    ).fetchone()
    assert found is not None
    read = sum(
        node["Actual Rows"] * node["Actual Loops"]
        for node in nodes(found["QUERY PLAN"][0]["Plan"])
        if node.get("Relation Name") == "outbox"
    )
    assert 100 <= read < 200
