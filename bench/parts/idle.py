"""Resource usage of the three processes while they are idle.

One service, one relay and one worker have default settings and no work, and are measured after five idle seconds. Each
sample is an interval of 12 s, and the intervals follow each other. CPU is the CPU time of the process; memory is its
resident set at the end of the interval (`extra` has its unique and its proportional set, if the system reports them).
Postgres statements are the calls in pg_stat_statements for the database of the processes, BEGIN and COMMIT included. If
the server does not preload it, an embedded server that does is used instead. Redis commands are
`total_commands_processed`, which counts a script and each command that it calls; `extra` lists commands and statements
by kind. The commands and statements of the bench itself are subtracted.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import psutil
import psycopg
import redis

from bench.figure import OURS, Figure
from bench.testbed import Bench
from outbox.devstack.embedded import embedded_postgres
from outbox.runtime.migrations import migrate
from tests.support.mailbox import free_port

_MODULES = ("service", "relay", "worker")
_SETTLING_TIME = 5.0
_INTERVAL = 12.0
"""Seconds."""

_COUNTS_STATEMENTS = "SELECT current_setting('shared_preload_libraries') ~ '\\mpg_stat_statements\\M'"
_STATEMENTS = """
SELECT query, calls FROM pg_stat_statements
WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND query !~ 'pg_stat_statements'
"""


@dataclass(frozen=True)
class _Reading:
    """All counters at one moment."""

    at: float
    cpu: dict[str, float]
    """CPU seconds by process."""
    statements: dict[str, int]
    """Calls by statement."""
    commands: int
    """Commands that Redis has processed, without those of the bench."""
    by_command: dict[str, int]
    """Calls by Redis command."""


def measure(bench: Bench) -> list[Figure]:
    """Returns the figures of this part."""
    with ExitStack() as stack:
        database_url = stack.enter_context(_counting_database(bench))
        port = free_port()
        settings = {"DATABASE_URL": database_url, "LOG_LEVEL": "info", "HTTP_SERVER_ADDRESS": f"127.0.0.1:{port}"}
        started = {module: stack.enter_context(bench.start(module, **settings)) for module in _MODULES}
        for process in started.values():
            process.await_event("started")
        counters = _Counters(
            {module: psutil.Process(process.popen.pid) for module, process in started.items()},
            stack.enter_context(psycopg.connect(database_url, autocommit=True)),
            stack.enter_context(bench.redis_client()),
        )
        time.sleep(1.0 if bench.smoke else _SETTLING_TIME)
        readings, memory = [counters.read()], []
        for _ in range(bench.runs):
            time.sleep(2.0 if bench.smoke else _INTERVAL)
            readings.append(counters.read())
            memory.append(counters.memory())
    return _figures(readings, memory)


@contextmanager
def _counting_database(bench: Bench) -> Iterator[str]:
    """Yields the URL of a migrated database whose server counts statements."""
    bench.reset()
    with bench.connect() as connection:
        row = connection.execute(_COUNTS_STATEMENTS).fetchone()
        counts_statements = bool(row and row[0])
    with ExitStack() as stack:
        url = bench.database_url
        if not counts_statements:
            settings = ["shared_preload_libraries=pg_stat_statements"]
            url = stack.enter_context(embedded_postgres(bench.folder / "idle", settings=settings)).url
            migrate(url)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
        yield url


class _Counters:
    """Reads the counters of the processes, Postgres and Redis."""

    def __init__(
        self, processes: dict[str, psutil.Process], connection: psycopg.Connection[Any], client: redis.Redis
    ) -> None:
        self._processes = processes
        self._connection = connection
        self._client = client
        self._own_commands = 0

    def read(self) -> _Reading:
        """Reads all counters."""
        statements = {" ".join(text.split())[:150]: calls for text, calls in self._connection.execute(_STATEMENTS)}
        commands: Any = self._client.info("stats")
        by_command: Any = self._client.info("commandstats")
        own_commands, self._own_commands = self._own_commands, self._own_commands + 2
        return _Reading(
            at=time.monotonic(),
            cpu={name: sum(process.cpu_times()[:2]) for name, process in self._processes.items()},
            statements=statements,
            commands=int(commands["total_commands_processed"]) - own_commands,
            by_command={
                name.removeprefix("cmdstat_"): int(stats["calls"])
                for name, stats in by_command.items()
                if name != "cmdstat_info"
            },
        )

    def memory(self) -> dict[str, dict[str, float]]:
        """Returns MB by process and kind: `rss`, and `uss` and `pss` if the system reports them."""
        memory = {}
        for name, process in self._processes.items():
            info = process.memory_full_info()
            memory[name] = {
                kind: round(getattr(info, kind) / 2**20, 2) for kind in ("rss", "uss", "pss") if hasattr(info, kind)
            }
        return memory


def _figures(readings: list[_Reading], memory: list[dict[str, dict[str, float]]]) -> list[Figure]:
    intervals = list(pairwise(readings))
    figures = [
        _figure(
            f"CPU of an idle {name}",
            "% of a core",
            [100 * (after.cpu[name] - before.cpu[name]) / (after.at - before.at) for before, after in intervals],
            "at most 1",
        )
        for name in _MODULES
    ]
    statements = _rates([(before.statements, after.statements, after.at - before.at) for before, after in intervals])
    figures.append(
        _figure(
            "Postgres statements, all three processes idle",
            "per second",
            [sum(calls.values()) for calls in statements],
            "at most 2",
            by_statement=_mean(statements),
        )
    )
    commands = _rates([(before.by_command, after.by_command, after.at - before.at) for before, after in intervals])
    figures.append(
        _figure(
            "Redis commands, all three processes idle",
            "per second",
            [(after.commands - before.commands) / (after.at - before.at) for before, after in intervals],
            "at most 5",
            by_command=_mean(commands),
        )
    )
    figures += [
        _figure(
            f"memory of an idle {name}",
            "MB",
            [usage[name]["rss"] for usage in memory],
            "at most 80",
            **{kind: [usage[name][kind] for usage in memory] for kind in memory[0][name]},
        )
        for name in _MODULES
    ]
    return figures


def _figure(title: str, unit: str, samples: list[float], target: str, **extra: Any) -> Figure:
    return Figure("idle", title, unit, higher_is_better=False, samples={OURS: samples}, target=target, extra=extra)


def _rates(changes: list[tuple[dict[str, int], dict[str, int], float]]) -> list[dict[str, float]]:
    """Returns the increase per second of each counter that has increased, for each interval."""
    return [
        {name: (calls - before.get(name, 0)) / seconds for name, calls in after.items() if calls > before.get(name, 0)}
        for before, after, seconds in changes
    ]


def _mean(rates: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for rate in rates for name in rate})
    means = {name: sum(rate.get(name, 0.0) for rate in rates) / len(rates) for name in names}
    return {name: round(mean, 3) for name, mean in sorted(means.items(), key=lambda item: -item[1])}
