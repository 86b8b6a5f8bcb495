"""Adds outbox rows, hands them over, and times relays and workers.

All times in this module are read from the clock of Postgres, so that two clocks are never compared.
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
from bench.testbed import Bench
from outbox.rq_jobs import queue_key
from outbox.runtime import postgres, redis_connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.publish import publish

QUEUE = "default"
QUEUE_KEY = queue_key(QUEUE)
"""Key of the list of `QUEUE` in Redis."""
SCHEDULE_KEY = Scheduler.scheduled_jobs_key
"""Key of rq-scheduler's sorted set."""
AMPLE_WINDOW = 1_000_000
"""`OUTBOX_WINDOW` with room for all rows of a part."""

_PARKED_KEY = "bench:parked"
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

_TIMEOUT = 120.0
"""Seconds that a wait may take."""
_POLL_INTERVAL = 0.02
"""Seconds between two polls of Redis. A poll takes Redis microseconds."""
_SHORT_POLL_INTERVAL = 0.002
"""Seconds between two polls of Postgres, once Redis holds the expected number of jobs."""


def add_rows(connection: psycopg.Connection[Any], rows: int, task: str, *, delay: float = 0) -> None:
    """Adds rows to `QUEUE` in one statement, and analyzes the table.

    Args:
        connection: a connection in autocommit mode.
        rows: number of rows.
        task: name of a task without payload.
        delay: seconds until the rows are due.
    """
    connection.execute(
        "INSERT INTO outbox (task, payload, queue, run_at) "
        "SELECT %s, '{}', %s, now() + make_interval(secs => %s) FROM generate_series(1, %s)",
        [task, QUEUE, delay, rows],
    )
    connection.execute("ANALYZE outbox")


def hand_over(bench: Bench, queue: str = QUEUE) -> None:
    """Hands over all pending rows of a queue, as a relay does."""
    settings = RelaySettings(database_url=bench.database_url, redis_url=bench.redis_url, window=AMPLE_WINDOW)
    with (
        postgres.connect(bench.database_url, "bench") as connection,
        redis_connection.connect(bench.redis_url, "bench") as client,
    ):
        while publish(connection, client, queue, settings):
            pass


def time_workers(bench: Bench, queue: str, workers: int, **env: str) -> float:
    """Starts workers, and returns the seconds from the first claim until every row is done.

    The jobs are under another key until all workers have registered. So no start of a process is measured, and all
    workers begin at the same moment.

    Args:
        bench: the bench; all rows have been handed over.
        queue: queue of the rows.
        workers: number of processes.
        env: further settings of the workers.
    """
    key = queue_key(queue)
    with bench.connect() as connection, bench.redis_client() as client, ExitStack() as stack:
        client.rename(key, _PARKED_KEY)
        started = [stack.enter_context(bench.start("worker", **env)) for _ in range(workers)]
        deadline = time.monotonic() + _TIMEOUT
        while int(client.scard(REDIS_WORKER_KEYS)) < workers:
            _check_progress(started, deadline, "not all workers have registered")
            time.sleep(_POLL_INTERVAL)
        client.rename(_PARKED_KEY, key)
        await_length(client, key, 0, started)
        return time_completion(connection, started)


def await_length(
    client: redis.Redis, key: str, length: int, processes: Sequence[Process], *, interval: float = _POLL_INTERVAL
) -> None:
    """Waits until a list or sorted set in Redis has a number of members.

    Args:
        client: a client of Redis.
        key: `SCHEDULE_KEY`, or the key of a list.
        length: number of members to wait for.
        processes: processes that must keep running.
        interval: seconds between two polls.

    Raises:
        RuntimeError: one of the processes has ended.
        TimeoutError: the wait took too long.
    """
    get_length = client.zcard if key == SCHEDULE_KEY else client.llen
    deadline = time.monotonic() + _TIMEOUT
    while (found := int(get_length(key))) != length:
        _check_progress(processes, deadline, f"{found} of {length} jobs in {key}")
        time.sleep(interval)


def time_hand_over(connection: psycopg.Connection[Any], processes: Sequence[Process]) -> float:
    """Waits until no row is pending, and returns the seconds since the hand-over of the first began."""
    ended = _await_time(connection, _NONE_PENDING, processes)
    return _seconds_since(connection, _SECONDS_SINCE_ENQUEUED, ended)


def time_completion(connection: psycopg.Connection[Any], processes: Sequence[Process]) -> float:
    """Waits until every row is done, and returns the seconds since the claim of the first began.

    Args:
        connection: a connection in autocommit mode.
        processes: processes that must keep running.

    Raises:
        RuntimeError: a row is dead or had a second attempt, so the time means nothing.
    """
    ended = _await_time(connection, _NONE_OPEN, processes)
    failed = connection.execute(_FAILED).fetchone()
    if failed and failed[0]:
        raise RuntimeError(f"{failed[0]} rows failed: {failed[1]}")
    return _seconds_since(connection, _SECONDS_SINCE_STARTED, ended)


def _await_time(
    connection: psycopg.Connection[Any], statement: LiteralString, processes: Sequence[Process]
) -> dt.datetime:
    """Waits until the statement returns a time, and returns it."""
    deadline = time.monotonic() + _TIMEOUT
    while (row := connection.execute(statement).fetchone()) is None:
        _check_progress(processes, deadline, "some rows are not finished")
        time.sleep(_SHORT_POLL_INTERVAL)
    at: dt.datetime = row[0]
    return at


def _seconds_since(connection: psycopg.Connection[Any], statement: LiteralString, ended: dt.datetime) -> float:
    row = connection.execute(statement, [ended]).fetchone()
    assert row is not None
    return float(row[0])


def _check_progress(processes: Sequence[Process], deadline: float, state: str) -> None:
    for process in processes:
        process.check()
    if time.monotonic() > deadline:
        raise TimeoutError(f"not within {_TIMEOUT:g} s: {state}")
