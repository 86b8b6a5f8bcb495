"""What more processes do: relays and workers side by side, on one machine."""

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

from bench.fill import add_pending
from bench.handlers import NOOP
from bench.measure import Figure
from bench.process import Process
from bench.rows import add_rows, seconds_to_do
from bench.scale.lives import settings_of
from bench.stage import Bench
from outbox.queries import query
from outbox.rq_jobs import queue_key
from outbox.runtime.migrations import migrate

_QUEUES = ("critical", "default")
_NUMBERS = (1, 2, 4)
"""Of relays, and of workers."""
_PROCESSES = "processes on one machine"
_PATIENCE = 60.0
_LOOK = 0.002
_MEMORY_LOOK = 0.02

_EMPTY_WINDOWS = "UPDATE outbox SET status = 'done', done_at = now() WHERE status = 'enqueued'"


def of_relays(bench: Bench, database_url: str) -> list[Figure]:
    """Measures the drain rate of one relay, two and four, and how much memory Redis takes for four.

    Args:
        bench: the stage.
        database_url: a database with a long backlog.
    """
    highest: list[float] = []
    jobs = min(2 * settings_of(bench, database_url).window, bench.size(1_000_000, 1_000))
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(database_url, autocommit=True))
        client = stack.enter_context(bench.client())
        bench.empty_redis()
        relays = [
            stack.enter_context(bench.start("relay", DATABASE_URL=database_url, LOG_LEVEL="info"))
            for _ in range(max(_NUMBERS))
        ]
        _await_jobs(client, jobs, relays)
        time.sleep(1.0)  # all of them have seen that the windows are full

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
                if number == max(_NUMBERS):
                    highest.append(memory / 2**20)
                time.sleep(0.2)  # a batch that is on its way belongs to this run
                return jobs / seconds

            return run

        drained = bench.in_turn(
            "scale",
            "drain rate of relays side by side",
            "rows/s",
            {_relays(number): one_run(number) for number in _NUMBERS},
        )
    drained.extra["curve"] = {
        "by": _PROCESSES,
        "points": [[number, drained.median(_relays(number))] for number in _NUMBERS],
    }
    memory = Figure(
        "scale",
        "Redis with a million rows of backlog, at most",
        "MB",
        higher_is_better=False,
        samples={_relays(max(_NUMBERS)): highest},
        target="under 64",
    )
    return [drained, memory]


def _relays(number: int) -> str:
    return f"{number} relay{'s' if number > 1 else ''}"


def _await_jobs(client: redis.Redis, jobs: int, relays: Sequence[Process]) -> int:
    """Waits until the queues hold that many jobs, and returns the highest of Redis' used bytes until then.

    Raises:
        TimeoutError: they do not come to hold them.
    """
    deadline = time.perf_counter() + _PATIENCE
    highest, memory_at = 0, 0.0
    while True:
        length = sum(int(client.llen(queue_key(name))) for name in _QUEUES)
        if length >= jobs or time.perf_counter() > memory_at:
            used: Any = client.info("memory")
            highest = max(highest, int(used["used_memory"]))
            memory_at = time.perf_counter() + _MEMORY_LOOK
        if length >= jobs:
            return highest
        for relay in relays:
            relay.check()
        if time.perf_counter() > deadline:
            raise TimeoutError(f"Redis holds {length} of {jobs} jobs after {_PATIENCE:g} s")
        time.sleep(_LOOK)


def of_workers(bench: Bench) -> Figure:
    """Measures the rate of one worker, two and four."""
    rows = bench.size(20_000, 500)
    with ExitStack() as stack:
        fleets = {number: _Fleet(bench, stack, number) for number in _NUMBERS}
        figure = bench.in_turn(
            "scale",
            "rows that do nothing, by workers side by side",
            "rows/s",
            {
                f"{number} worker{'s' if number > 1 else ''}": partial(fleet.done_per_second, rows)
                for number, fleet in fleets.items()
            },
        )
    figure.extra["curve"] = {
        "by": _PROCESSES,
        "points": [[number, median(rates)] for number, rates in zip(_NUMBERS, figure.samples.values(), strict=True)],
    }
    return figure


class _Fleet:
    """A relay and some workers, with a database of Postgres and one of Redis to themselves."""

    def __init__(self, bench: Bench, stack: ExitStack, workers: int) -> None:
        database_url = bench.database()
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

    def done_per_second(self, rows: int) -> float:
        """Has so many rows done, and returns how many were per second, from the first claim to the last mark."""
        self._connection.execute("DELETE FROM outbox")
        add_rows(self._connection, rows, NOOP.name)
        self._connection.execute(query("notify_relays"))
        return rows / seconds_to_do(self._connection, self._processes)
