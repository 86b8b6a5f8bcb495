"""Done rows go after their time; dead rows stay; rows that nobody will hand over are told of."""

from collections.abc import Iterator
from typing import Any

import psycopg
from structlog.testing import capture_logs

from outbox.queries import query
from outbox.runtime.settings import RelaySettings
from outbox_relay.retention import BATCH, Retention
from outbox_relay.unserved_queues import warn_about_unserved_queues

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
    """It counts from when they were done, and is what the setting says."""
    _done(connection, 86_401)
    _done(connection, 86_390)
    assert Retention(relay_settings).delete(connection) == 1
    assert Retention(relay_settings).delete(connection) == 0
    assert _count(connection) == 1
    assert Retention(relay_settings.model_copy(update={"retention": 60.0})).delete(connection) == 1


def test_other_rows_stay_however_old(connection: Connection, relay_settings: RelaySettings) -> None:
    """A dead row waits for somebody to decide; pending, enqueued and running rows are work."""
    for status, lease in (("dead", None), ("pending", None), ("enqueued", None), ("running", "2000-01-01")):
        connection.execute(
            "INSERT INTO outbox (task, payload, status, created_at, run_at, enqueued_at, started_at, lease_until)"
            " VALUES ('t', '{}', %s, '2000-01-01', '2000-01-01', '2000-01-01', '2000-01-01', %s)",
            [status, lease],
        )
    assert Retention(relay_settings).delete(connection) == 0
    assert _count(connection) == 4


def test_history_goes_in_batches(connection: Connection, relay_settings: RelaySettings) -> None:
    """No statement deletes without bound."""
    _done(connection, 100_000, BATCH + 5)
    retention = Retention(relay_settings)
    assert [retention.delete(connection) for _ in range(3)] == [BATCH, 5, 0]


def test_rows_in_a_queue_that_nobody_serves_are_told_of(connection: Connection, relay_settings: RelaySettings) -> None:
    """One line per queue with the number of rows; silence where all is served, or over with."""
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


def test_rows_that_redis_holds_for_nobody_are_told_of_too(
    connection: Connection, relay_settings: RelaySettings
) -> None:
    """Those of a queue that was taken from OUTBOX_QUEUES while Redis had its jobs: no sweep misses them there."""
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
    """Of 30,000 pending rows it reads one for each queue, and of a queue that nobody serves as many as it counts."""
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
        for node in _nodes(found["QUERY PLAN"][0]["Plan"])
        if node.get("Relation Name") == "outbox"
    )
    assert 100 <= read < 200


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from _nodes(child)
