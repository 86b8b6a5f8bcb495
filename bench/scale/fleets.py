"""Measures throughput by the number of relays and of workers on one machine."""

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import psycopg
import redis

from bench.figure import Figure
from bench.fill import add_pending
from bench.handlers import NOOP
from bench.process import Process
from bench.rows import add_rows, time_completion
from bench.scale.lifecycle import relay_settings
from bench.testbed import Bench
from outbox.queries import query
from outbox.rq_jobs import queue_key
from outbox.runtime.migrations import migrate

_QUEUES = ("critical", "default")
_FLEET_SIZES = (1, 2, 4)
"""Numbers of relays, and of workers."""
_BY_PROCESSES = "processes on one machine"
_TIMEOUT = 60.0
_POLL_INTERVAL = 0.002
_MEMORY_INTERVAL = 0.02
"""Seconds."""

_EMPTY_WINDOWS = "UPDATE outbox SET status = 'done', done_at = now() WHERE status = 'enqueued'"


def measure_relays(bench: Bench, database_url: str) -> list[Figure]:
    """Measures the drain rate of one, two and four relays, and the memory of Redis with four.

    Args:
        bench: the bench.
        database_url: URL of a database with a long backlog.
    """
    peak_memory: list[float] = []
    jobs = min(2 * relay_settings(bench, database_url).window, bench.size(1_000_000, 1_000))
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(database_url, autocommit=True))
        client = stack.enter_context(bench.redis_client())
        bench.empty_redis()
        relays = [
            stack.enter_context(bench.start("relay", DATABASE_URL=database_url, LOG_LEVEL="info"))
            for _ in range(max(_FLEET_SIZES))
        ]
        _await_jobs(client, jobs, relays)
        time.sleep(1.0)  # lets all relays see that the windows are full

        def one_run(number: int) -> Callable[[], float]:
            def run() -> float:
                for relay in relays:
                    relay.send(signal.SIGSTOP)
                try:
                    connection.execute(_EMPTY_WINDOWS)
                    client.flushdb()
                    if bench.smoke:
                        add_pending(database_url, jobs)
                    connection.execute(query("notify_relays"))
                    begun = time.perf_counter()
                    for relay in relays[:number]:
                        relay.send(signal.SIGCONT)
                    memory = _await_jobs(client, jobs, relays)
                    seconds = time.perf_counter() - begun
                finally:
                    for relay in relays:
                        relay.send(signal.SIGCONT)
                if number == max(_FLEET_SIZES):
                    peak_memory.append(memory / 2**20)
                time.sleep(0.2)  # batches in progress belong to this run
                return jobs / seconds

            return run

        drain_rates = bench.measure_in_turn(
            "scale",
            "drain rate, by number of relays",
            "rows/s",
            {_relay_label(number): one_run(number) for number in _FLEET_SIZES},
        )
    drain_rates.extra["curve"] = {
        "by": _BY_PROCESSES,
        "points": [[number, drain_rates.median(_relay_label(number))] for number in _FLEET_SIZES],
    }
    memory = Figure(
        "scale",
        "Redis memory with a backlog of a million rows",
        "MB",
        higher_is_better=False,
        samples={_relay_label(max(_FLEET_SIZES)): peak_memory},
        target="under 64",
    )
    return [drain_rates, memory]


def _relay_label(number: int) -> str:
    return f"{number} relay{'s' if number > 1 else ''}"


def _await_jobs(client: redis.Redis, jobs: int, relays: Sequence[Process]) -> int:
    """Waits until the queues hold a number of jobs, and returns the highest memory usage of Redis in bytes.

    Raises:
        TimeoutError: they do not hold that many in time.
    """
    deadline = time.perf_counter() + _TIMEOUT
    highest, next_sample = 0, 0.0
    while True:
        length = sum(int(client.llen(queue_key(name))) for name in _QUEUES)
        if length >= jobs or time.perf_counter() > next_sample:
            used: Any = client.info("memory")
            highest = max(highest, int(used["used_memory"]))
            next_sample = time.perf_counter() + _MEMORY_INTERVAL
        if length >= jobs:
            return highest
        for relay in relays:
            relay.check()
        if time.perf_counter() > deadline:
            raise TimeoutError(f"Redis holds {length} of {jobs} jobs after {_TIMEOUT:g} s")
        time.sleep(_POLL_INTERVAL)


def measure_workers(bench: Bench) -> Figure:
    """Measures the throughput of one, two and four workers."""
    rows = bench.size(20_000, 500)
    with ExitStack() as stack:
        fleets = {number: _Fleet(bench, stack, number) for number in _FLEET_SIZES}
        figure = bench.measure_in_turn(
            "scale",
            "no-op rows, by number of workers",
            "rows/s",
            {
                f"{number} worker{'s' if number > 1 else ''}": partial(fleet.rows_per_second, rows)
                for number, fleet in fleets.items()
            },
        )
    figure.extra["curve"] = {
        "by": _BY_PROCESSES,
        "points": [
            [number, median(rates)] for number, rates in zip(_FLEET_SIZES, figure.samples.values(), strict=True)
        ],
    }
    return figure


class _Fleet:
    """A relay and a number of workers, with their own databases in Postgres and Redis."""

    def __init__(self, bench: Bench, stack: ExitStack, workers: int) -> None:
        database_url = bench.create_database()
        migrate(database_url)
        self._connection = stack.enter_context(psycopg.connect(database_url, autocommit=True))
        settings = {
            "DATABASE_URL": database_url,
            "REDIS_URL": f"{bench.redis_url}{'&' if urlsplit(bench.redis_url).query else '?'}db={workers}",
            "OUTBOX_HANDLERS": "bench.handlers",
            "LOG_LEVEL": "info",
        }
        self._processes = [
            stack.enter_context(bench.start(module, **settings)) for module in ("relay", *["worker"] * workers)
        ]
        for process in self._processes:
            process.await_event("started")

    def rows_per_second(self, rows: int) -> float:
        """Runs a number of rows, and returns rows per second, from the first claim to the last completion."""
        self._connection.execute("DELETE FROM outbox")
        add_rows(self._connection, rows, NOOP.name)
        self._connection.execute(query("notify_relays"))
        return rows / time_completion(self._connection, self._processes)
