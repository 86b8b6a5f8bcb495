"""What the three processes take while nothing happens.

One service, one relay and one worker at default settings, with nothing to do, after five quiet seconds. Each sample is
a slice of 12 s, and the slices follow each other. CPU is what the system has charged to the process; memory is its
resident set at the slice's end (`extra` has what it shares with nobody, and its proportional share, where the system
tells). Statements at Postgres are pg_stat_statements' calls in the processes' database, BEGIN and COMMIT among them;
a server that does not count them is left alone, and an embedded one that does takes its place. Commands at Redis are
its `total_commands_processed`, which counts what a script calls as well as the script; `extra` has each kind of command
and of statement by itself. What the bench itself asks of either is subtracted.
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

from bench.measure import OURS, Figure
from bench.stage import Bench
from outbox.devstack.embedded import embedded_postgres
from outbox.runtime.migrations import migrate
from tests.support.mailbox import free_port

_MODULES = ("service", "relay", "worker")
_SETTLING = 5.0
_SLICE = 12.0

_COUNTED = "SELECT current_setting('shared_preload_libraries') ~ '\\mpg_stat_statements\\M'"
_STATEMENTS = """
SELECT query, calls FROM pg_stat_statements
WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND query !~ 'pg_stat_statements'
"""


@dataclass(frozen=True)
class _Look:
    """All counters at one moment."""

    at: float
    cpu: dict[str, float]
    """Seconds by process."""
    statements: dict[str, int]
    """Calls by statement."""
    commands: int
    """That Redis has processed, but for our own."""
    by_command: dict[str, int]


def measure(bench: Bench) -> list[Figure]:
    """Measures the part."""
    with ExitStack() as stack:
        database_url = stack.enter_context(_counting_database(bench))
        port = free_port()
        settings = {"DATABASE_URL": database_url, "LOG_LEVEL": "info", "HTTP_SERVER_ADDRESS": f"127.0.0.1:{port}"}
        started = {module: stack.enter_context(bench.start(module, **settings)) for module in _MODULES}
        for process in started.values():
            process.await_event("started")
        watch = _Watch(
            {module: psutil.Process(process.popen.pid) for module, process in started.items()},
            stack.enter_context(psycopg.connect(database_url, autocommit=True)),
            stack.enter_context(bench.client()),
        )
        time.sleep(1.0 if bench.smoke else _SETTLING)
        looks, memory = [watch.look()], []
        for _ in range(bench.runs):
            time.sleep(2.0 if bench.smoke else _SLICE)
            looks.append(watch.look())
            memory.append(watch.memory())
    return _figures(looks, memory)


@contextmanager
def _counting_database(bench: Bench) -> Iterator[str]:
    """Yields the URL of a migrated database whose server counts statements."""
    bench.fresh()
    with bench.connect() as connection:
        row = connection.execute(_COUNTED).fetchone()
        counts = bool(row and row[0])
    with ExitStack() as stack:
        url = bench.database_url
        if not counts:
            settings = ["shared_preload_libraries=pg_stat_statements"]
            url = stack.enter_context(embedded_postgres(bench.folder / "idle", settings=settings)).url
            migrate(url)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
        yield url


class _Watch:
    """Reads the counters."""

    def __init__(
        self, processes: dict[str, psutil.Process], connection: psycopg.Connection[Any], client: redis.Redis
    ) -> None:
        self._processes = processes
        self._connection = connection
        self._client = client
        self._own = 0

    def look(self) -> _Look:
        """Reads all of them."""
        statements = {" ".join(text.split())[:150]: calls for text, calls in self._connection.execute(_STATEMENTS)}
        commands: Any = self._client.info("stats")
        by_command: Any = self._client.info("commandstats")
        own, self._own = self._own, self._own + 2
        return _Look(
            at=time.monotonic(),
            cpu={name: sum(process.cpu_times()[:2]) for name, process in self._processes.items()},
            statements=statements,
            commands=int(commands["total_commands_processed"]) - own,
            by_command={
                name.removeprefix("cmdstat_"): int(counted["calls"])
                for name, counted in by_command.items()
                if name != "cmdstat_info"
            },
        )

    def memory(self) -> dict[str, dict[str, float]]:
        """Returns MB by process, and by how they are counted: `rss`, and `uss` and `pss` where the system tells."""
        found = {}
        for name, process in self._processes.items():
            told = process.memory_full_info()
            found[name] = {
                kind: round(getattr(told, kind) / 2**20, 2) for kind in ("rss", "uss", "pss") if hasattr(told, kind)
            }
        return found


def _figures(looks: list[_Look], memory: list[dict[str, dict[str, float]]]) -> list[Figure]:
    slices = list(pairwise(looks))
    figures = [
        _figure(
            f"CPU of an idle {name}",
            "% of a core",
            [100 * (after.cpu[name] - before.cpu[name]) / (after.at - before.at) for before, after in slices],
            "at most 1",
        )
        for name in _MODULES
    ]
    statements = _rates([(before.statements, after.statements, after.at - before.at) for before, after in slices])
    figures.append(
        _figure(
            "statements at Postgres, by all three idle",
            "a second",
            [sum(calls.values()) for calls in statements],
            "at most 2",
            by_statement=_mean(statements),
        )
    )
    commands = _rates([(before.by_command, after.by_command, after.at - before.at) for before, after in slices])
    figures.append(
        _figure(
            "commands at Redis, by all three idle",
            "a second",
            [(after.commands - before.commands) / (after.at - before.at) for before, after in slices],
            "at most 5",
            by_command=_mean(commands),
        )
    )
    figures += [
        _figure(
            f"memory of an idle {name}",
            "MB",
            [taken[name]["rss"] for taken in memory],
            "at most 80",
            **{kind: [taken[name][kind] for taken in memory] for kind in memory[0][name]},
        )
        for name in _MODULES
    ]
    return figures


def _figure(title: str, unit: str, samples: list[float], target: str, **extra: Any) -> Figure:
    return Figure("idle", title, unit, higher_is_better=False, samples={OURS: samples}, target=target, extra=extra)


def _rates(counted: list[tuple[dict[str, int], dict[str, int], float]]) -> list[dict[str, float]]:
    """Returns how much each counter rose per second, for those that did."""
    return [
        {name: (calls - before.get(name, 0)) / seconds for name, calls in after.items() if calls > before.get(name, 0)}
        for before, after, seconds in counted
    ]


def _mean(rates: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for rate in rates for name in rate})
    means = {name: sum(rate.get(name, 0.0) for rate in rates) / len(rates) for name in names}
    return {name: round(mean, 3) for name, mean in sorted(means.items(), key=lambda item: -item[1])}
