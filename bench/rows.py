"""Rows of the outbox on the bench: how they come into being, into Redis, and when the last of them has got there.

All times are Postgres' own, so that no two clocks are ever compared.
"""

import datetime as dt
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, LiteralString

import psycopg
import redis
from rq.worker_registration import REDIS_WORKER_KEYS
from rq_scheduler import Scheduler

from bench.process import Process
from bench.stage import Bench
from outbox.rq_jobs import queue_key
from outbox.runtime import postgres, redis_connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.publish import publish

QUEUE = "default"
QUEUED = queue_key(QUEUE)
"""The key of that queue's list."""
SCHEDULED = Scheduler.scheduled_jobs_key
"""The key of rq-scheduler's set."""
AMPLE_WINDOW = 1_000_000
"""`OUTBOX_WINDOW` where all rows are to be in Redis at once."""

_ASIDE = "bench:aside"
_NONE_PENDING = "SELECT clock_timestamp() WHERE NOT EXISTS (SELECT FROM outbox WHERE status = 'pending')"
_NONE_OPEN = """
SELECT clock_timestamp()
WHERE NOT EXISTS (SELECT FROM outbox WHERE status = 'pending')
  AND NOT EXISTS (SELECT FROM outbox WHERE status = 'enqueued')
  AND NOT EXISTS (SELECT FROM outbox WHERE status = 'running')
"""
_SECONDS_SINCE_ENQUEUED = "SELECT extract(epoch FROM %s - min(enqueued_at)) FROM outbox"
_SECONDS_SINCE_STARTED = "SELECT extract(epoch FROM %s - min(started_at)) FROM outbox"
_FAILED = "SELECT count(*), min(last_error) FROM outbox WHERE status <> 'done' OR attempts <> 1"

_PATIENCE = 120.0
_LOOK = 0.02
"""Seconds between two looks at Redis; each costs it microseconds."""
_CLOSE_LOOK = 0.002
"""Seconds between two looks at Postgres, once Redis has told that the end is near."""


def add_rows(connection: psycopg.Connection[Any], rows: int, task: str, *, delay: float = 0) -> None:
    """Adds rows in one statement and lets the planner know.

    Args:
        connection: in autocommit mode.
        rows: how many.
        task: the name of a task without payload, for the queue `default`.
        delay: seconds until they are due.
    """
    connection.execute(
        "INSERT INTO outbox (task, payload, queue, run_at) "
        "SELECT %s, '{}', %s, now() + make_interval(secs => %s) FROM generate_series(1, %s)",
        [task, QUEUE, delay, rows],
    )
    connection.execute("ANALYZE outbox")


def hand_over(bench: Bench, queue: str = QUEUE) -> None:
    """Hands all pending rows of a queue to Redis, as a relay does."""
    settings = RelaySettings(database_url=bench.database_url, redis_url=bench.redis_url, window=AMPLE_WINDOW)
    with (
        postgres.connect(bench.database_url, "bench") as connection,
        redis_connection.connect(bench.redis_url, "bench") as client,
    ):
        while publish(connection, client, queue, settings):
            pass


def seconds_to_work_off(bench: Bench, queue: str, workers: int, **env: str) -> float:
    """Has workers do all jobs of a queue, and returns the seconds from the first claim until every row is done.

    The jobs are put aside until all workers wait for them: no start of a process is measured, and workers side by
    side begin at the same moment.

    Args:
        bench: the stage; all rows have been handed over.
        queue: where they are.
        workers: how many processes.
        env: further settings of the workers.
    """
    key = queue_key(queue)
    with bench.connect() as connection, bench.client() as client, ExitStack() as stack:
        client.rename(key, _ASIDE)
        started = [stack.enter_context(bench.start("worker", **env)) for _ in range(workers)]
        deadline = time.monotonic() + _PATIENCE
        while int(client.scard(REDIS_WORKER_KEYS)) < workers:
            _check(started, deadline, "the workers have not all signed on")
            time.sleep(_LOOK)
        client.rename(_ASIDE, key)
        await_length(client, key, 0, started)
        return seconds_to_do(connection, started)


def await_length(
    client: redis.Redis, key: str, length: int, processes: Sequence[Process], *, pause: float = _LOOK
) -> None:
    """Waits until a list or a sorted set in Redis has that many members.

    Args:
        client: of Redis.
        key: `QUEUED` or `SCHEDULED`.
        length: how many.
        processes: who must live meanwhile.
        pause: seconds between two looks.

    Raises:
        RuntimeError: one of the processes has died.
        TimeoutError: it takes too long.
    """
    look = client.zcard if key == SCHEDULED else client.llen
    deadline = time.monotonic() + _PATIENCE
    while (found := int(look(key))) != length:
        _check(processes, deadline, f"{found} of {length} jobs in {key}")
        time.sleep(pause)


def seconds_to_hand_over(connection: psycopg.Connection[Any], processes: Sequence[Process]) -> float:
    """Waits until no row is pending, and returns the seconds since the first was claimed for Redis."""
    ended = _await(connection, _NONE_PENDING, processes, _CLOSE_LOOK)
    return _first(connection, _SECONDS_SINCE_ENQUEUED, ended)


def seconds_to_do(connection: psycopg.Connection[Any], processes: Sequence[Process]) -> float:
    """Waits until every row is done, and returns the seconds since the first was claimed by a worker.

    Args:
        connection: in autocommit mode.
        processes: who must live meanwhile.

    Raises:
        RuntimeError: a row is dead or was tried twice: whatever this measures, it is not what was meant.
    """
    ended = _await(connection, _NONE_OPEN, processes, _CLOSE_LOOK)
    failed = connection.execute(_FAILED).fetchone()
    if failed and failed[0]:
        raise RuntimeError(f"{failed[0]} rows failed: {failed[1]}")
    return _first(connection, _SECONDS_SINCE_STARTED, ended)


def _await(
    connection: psycopg.Connection[Any], statement: LiteralString, processes: Sequence[Process], pause: float
) -> dt.datetime:
    """Waits until the statement yields a time, and returns that."""
    deadline = time.monotonic() + _PATIENCE
    while (row := connection.execute(statement).fetchone()) is None:
        _check(processes, deadline, "the rows are not all that far")
        time.sleep(pause)
    found: dt.datetime = row[0]
    return found


def _first(connection: psycopg.Connection[Any], statement: LiteralString, ended: dt.datetime) -> float:
    row = connection.execute(statement, [ended]).fetchone()
    assert row is not None
    return float(row[0])


def _check(processes: Sequence[Process], deadline: float, state: str) -> None:
    for process in processes:
        process.check()
    if time.monotonic() > deadline:
        raise TimeoutError(f"not within {_PATIENCE:g} s: {state}")
