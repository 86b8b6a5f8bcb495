"""Writes and reads outbox rows for tests."""

from typing import Any

import redis

from outbox.rq_jobs import Delivery
from tests.conftest import Connection


def add_row(connection: Connection, **columns: Any) -> Delivery:
    """Adds a row, by default handed over once, and returns its delivery."""
    values = {"task": "noted", "payload": "{}", "status": "enqueued", "delivery": 1, **columns}
    row = connection.execute(
        "INSERT INTO outbox (task, payload, queue, status, delivery, attempts, max_retries, timeout, run_at, done_at, "
        "lease_until) VALUES (%(task)s, %(payload)s, %(queue)s, %(status)s, %(delivery)s, %(attempts)s, "
        "%(max_retries)s, %(timeout)s, now() + make_interval(secs => %(delay)s), "
        "CASE WHEN %(status)s = 'done' THEN now() END, "
        "CASE WHEN %(status)s = 'running' THEN now() + interval '1 hour' END) RETURNING id",
        {"queue": "default", "attempts": 0, "max_retries": 3, "timeout": 30, "delay": 0, **values},
    ).fetchone()
    assert row is not None
    return Delivery(row["id"], values["delivery"])


def read_row(connection: Connection, delivery: Delivery) -> dict[str, Any]:
    """Returns a row, with the remaining seconds of its lease and until it is due."""
    row = connection.execute(
        "SELECT *, extract(epoch FROM lease_until - now())::float8 AS lease, "
        "extract(epoch FROM run_at - now())::float8 AS waits FROM outbox WHERE id = %s",
        [delivery.row_id],
    ).fetchone()
    assert row is not None
    return row


def offer(client: redis.Redis, *job_ids: str | bytes, queue: str = "default") -> None:
    """Appends job ids to a queue."""
    client.rpush(f"rq:queue:{queue}", *job_ids)
