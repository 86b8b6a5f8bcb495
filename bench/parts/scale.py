"""What a long history, a long backlog and more processes do to the speed, and what a row takes of disk and memory.

**History.** Three databases with a million pending rows each, half in either queue, and none, one or ten million `done`
rows beside them. In each in turn, 20 batches of 500 rows are handed over and then claimed 32 at a time (as many as a
worker has handlers), marked and forgotten by Redis. The drain rate is rows by the seconds within `relay.publish`'s
calls; the claim time is the median of `worker.claim`'s calls; both in this process, without logs.

**Relays.** Four relay processes at default settings on the ten million's database, whose windows are full; one, two or
four of them are let go on, the others stay stopped, at the moment at which both windows (20,000 rows in all) have been
emptied. Timed from that moment until Redis holds 20,000 jobs again. Redis' memory is the highest `used_memory` seen
with all four, every 20 ms.

**Workers.** One relay and one, two or four worker processes at default settings, each of these fleets with databases of
its own; 20,000 rows whose handler does nothing, for one fleet after the other, timed from the first claim until all
are done.

**Bytes per row.** One row's whole life with nothing beside it: added in a transaction of its own, handed over and
claimed in the batches above, marked. WAL is what Postgres has written for that, tables and indexes what they have
grown by before any vacuum, and at rest what a vacuumed `done` row takes in the ten million's table.
"""

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, LiteralString
from urllib.parse import urlsplit

import psycopg
import redis
from psycopg.rows import tuple_row

import outbox
from bench.fill import add_done, add_pending, clone
from bench.handlers import NOOP
from bench.measure import OURS, Figure
from bench.process import Process
from bench.rows import add_rows, seconds_to_do
from bench.stage import Bench
from outbox import postgres
from outbox import redis as outbox_redis
from outbox.jobs import Delivery, queue_key
from outbox.migrate import migrate
from outbox.postgres import Connection
from outbox.queries import query
from outbox.settings import RelaySettings
from outbox.tasks import SEND_VERIFY_EMAIL, SendVerifyEmail
from relay.publish import publish
from worker.claim import claim

_BATCHES = 20
_CLAIMED_AT_ONCE = 32
_QUEUES = ("critical", "default")
_NUMBERS = (1, 2, 4)
"""Of relays, and of workers."""
_PATIENCE = 60.0
_LOOK = 0.002
_MEMORY_LOOK = 0.02

_ENQUEUED = "SELECT id, delivery FROM outbox WHERE status = 'enqueued' ORDER BY id"
_EMPTY_WINDOWS = "UPDATE outbox SET status = 'done', done_at = now() WHERE status = 'enqueued'"
_WAL = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
_SIZES = "SELECT pg_table_size('outbox'), pg_indexes_size('outbox')"


@dataclass(frozen=True)
class _Lives:
    """What it took to bring rows through their life."""

    rows: int
    publishing: list[float]
    """Seconds per batch."""
    claiming: list[float]


def measure(bench: Bench) -> list[Figure]:
    """Measures the part."""
    million = bench.size(1_000_000, 8_000)
    histories = _histories(bench, million)
    figures = _of_histories(bench, histories)
    longest = histories[max(histories)]
    at_rest = _bytes_at_rest(longest)
    figures += _of_relays(bench, longest)
    figures.append(_of_workers(bench))
    return [*figures, *_of_bytes(bench, at_rest)]


def _histories(bench: Bench, million: int) -> dict[int, str]:
    """Returns databases by the number of done rows in them."""
    bench.empty_redis()
    none = bench.database()
    migrate(none)
    add_pending(none, million)
    histories = {0: none}
    for millions in (1, 10):
        histories[millions] = clone(bench, none)
    for millions in (1, 10):
        add_done(histories[millions], millions * million)
    with psycopg.connect(none, autocommit=True) as connection:
        connection.execute("CHECKPOINT")  # or it would come in the middle
    return histories


def _of_histories(bench: Bench, histories: dict[int, str]) -> list[Figure]:
    names = {millions: f"{millions} million done rows" if millions else "no done rows" for millions in histories}
    claiming: dict[int, list[float]] = {millions: [] for millions in histories}
    batches = bench.size(_BATCHES, 1)
    with ExitStack() as stack:
        connections = {
            millions: stack.enter_context(postgres.connect(url, "bench")) for millions, url in histories.items()
        }
        client = stack.enter_context(outbox_redis.connect(bench.redis_url, "bench"))

        def one_run(millions: int) -> Callable[[], float]:
            def run() -> float:
                lives = _live(connections[millions], client, _settings(bench, histories[millions]), batches)
                claiming[millions].append(median(lives.claiming) * 1000)
                return lives.rows / sum(lives.publishing)

            return run

        for millions in histories:
            one_run(millions)()  # what a process does once is not counted
            claiming[millions].clear()
        longest_first = sorted(histories, reverse=True)
        drained = bench.in_turn(
            "scale",
            "drain rate, by rows done before",
            "rows/s",
            {names[millions]: one_run(millions) for millions in longest_first},
            target="within 10 %",
        )
    drained.extra["rates"] = [[millions * 1_000_000, drained.median(names[millions])] for millions in histories]
    claimed = Figure(
        "scale",
        f"claim of {_CLAIMED_AT_ONCE} rows, by rows done before",
        "ms",
        higher_is_better=False,
        samples={names[millions]: claiming[millions] for millions in longest_first},
        target="within 10 %",
        extra={"times": [[millions * 1_000_000, median(claiming[millions])] for millions in histories]},
    )
    return [drained, claimed]


def _settings(bench: Bench, database_url: str) -> RelaySettings:
    return RelaySettings(database_url=database_url, redis_url=bench.redis_url)


def _live(connection: Connection, client: redis.Redis, settings: RelaySettings, batches: int) -> _Lives:
    """Brings rows of `critical` from pending to done, as relay and worker do it, and takes the times."""
    publishing, claiming, rows = [], [], 0
    for _ in range(batches):
        begun = time.perf_counter()
        rows += publish(connection, client, "critical", settings)
        publishing.append(time.perf_counter() - begun)
    client.flushdb()
    deliveries = [Delivery(row["id"], row["delivery"]) for row in connection.execute(_ENQUEUED).fetchall()]
    for batch in _parts(deliveries, settings.batch):  # no more rows run at a time than a fleet of workers has handlers
        for some in _parts(batch, _CLAIMED_AT_ONCE):
            begun = time.perf_counter()
            claim(connection, some, "0" * 32, settings.lease)
            claiming.append(time.perf_counter() - begun)
        connection.execute(query("mark"), _done(batch))
    return _Lives(rows, publishing, claiming)


def _done(deliveries: Sequence[Delivery]) -> dict[str, Any]:
    count = len(deliveries)
    return {
        "ids": [delivery.row for delivery in deliveries],
        "deliveries": [delivery.number for delivery in deliveries],
        "statuses": ["done"] * count,
        "delays": [0.0] * count,
        "attempts": [1] * count,
        "errors": [None] * count,
    }


def _parts(deliveries: Sequence[Delivery], size: int) -> list[Sequence[Delivery]]:
    return [deliveries[start : start + size] for start in range(0, len(deliveries), size)]


def _of_relays(bench: Bench, database_url: str) -> list[Figure]:
    highest: list[float] = []
    jobs = min(2 * _settings(bench, database_url).window, bench.size(1_000_000, 1_000))
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
    drained.extra["by_number"] = [[number, drained.median(_relays(number))] for number in _NUMBERS]
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


def _of_workers(bench: Bench) -> Figure:
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
    figure.extra["by_number"] = [
        [number, median(rates)] for number, rates in zip(_NUMBERS, figure.samples.values(), strict=True)
    ]
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


def _of_bytes(bench: Bench, at_rest: tuple[float, float]) -> list[Figure]:
    found = [_bytes(bench) for _ in range(bench.runs)]
    titles = ("WAL of one row's life", "table of one row's life", "indexes of one row's life")
    figures = [_disk(title, [taken[place] for taken in found]) for place, title in enumerate(titles)]
    table, indexes = at_rest
    return [
        *figures,
        _disk("table of a done row, at rest", [table]),
        _disk("indexes of a done row, at rest", [indexes]),
    ]


def _disk(title: str, samples: list[float]) -> Figure:
    return Figure("scale", title, "bytes", higher_is_better=False, samples={OURS: samples})


def _bytes(bench: Bench) -> tuple[float, float, float]:
    """Returns the bytes per row that a life takes: of WAL, in the table, in the indexes."""
    bench.fresh()
    batches = bench.size(4, 1)
    settings = _settings(bench, bench.database_url)
    rows = batches * settings.batch
    with (
        postgres.connect(bench.database_url, "bench") as connection,
        outbox_redis.connect(bench.redis_url, "bench") as client,
    ):
        connection.execute("ALTER TABLE outbox SET (autovacuum_enabled = false)")
        connection.execute("CHECKPOINT")
        wal = _count(connection, _WAL)
        table, indexes = _sizes(connection)
        for number in range(rows):
            outbox.add(connection, SEND_VERIFY_EMAIL, SendVerifyEmail(username=f"user_{number}"), delay=0)
        if (lived := _live(connection, client, settings, batches).rows) != rows:
            raise RuntimeError(f"{lived} of {rows} rows were handed over")
        wal = _count(connection, _WAL) - wal
        table, indexes = (later - before for later, before in zip(_sizes(connection), (table, indexes), strict=True))
    return wal / rows, table / rows, indexes / rows


def _bytes_at_rest(database_url: str) -> tuple[float, float]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        rows = _count(connection, "SELECT count(*) FROM outbox")
        table, indexes = _sizes(connection)
    return table / rows, indexes / rows


def _count(connection: psycopg.Connection[Any], statement: LiteralString) -> int:
    return _numbers(connection, statement)[0]


def _sizes(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    table, indexes = _numbers(connection, _SIZES)
    return table, indexes


def _numbers(connection: psycopg.Connection[Any], statement: LiteralString) -> list[int]:
    with connection.cursor(row_factory=tuple_row) as cursor:
        row = cursor.execute(statement).fetchone()
    assert row is not None
    return [int(number) for number in row]
