"""Measures drain rate and claim time with no, one million and ten million done rows."""

from collections.abc import Callable
from contextlib import ExitStack
from statistics import median

import psycopg

from bench.figure import Figure
from bench.fill import add_done, add_pending, clone
from bench.scale.lifecycle import CLAIMED_AT_ONCE, batches_per_window, relay_settings, run_lifecycle
from bench.testbed import Bench
from outbox.runtime import postgres, redis_connection
from outbox.runtime.migrations import migrate


def create_histories(bench: Bench, million: int) -> dict[int, str]:
    """Creates databases with a backlog, and returns their URLs by millions of done rows."""
    bench.empty_redis()
    without_history = bench.create_database()
    migrate(without_history)
    add_pending(without_history, million)
    databases = {0: without_history}
    for millions in (1, 10):
        databases[millions] = clone(bench, without_history)
    for millions in (1, 10):
        add_done(databases[millions], millions * million)
    with psycopg.connect(without_history, autocommit=True) as connection:
        connection.execute("CHECKPOINT")  # so that none begins during a measurement
    return databases


def measure_histories(bench: Bench, databases: dict[int, str]) -> list[Figure]:
    """Measures drain rate and claim time on the databases of `create_histories`."""
    names = {millions: f"{millions} million done rows" if millions else "no done rows" for millions in databases}
    claim_times: dict[int, list[float]] = {millions: [] for millions in databases}
    batches = batches_per_window(bench)
    with ExitStack() as stack:
        connections = {
            millions: stack.enter_context(postgres.connect(url, "bench")) for millions, url in databases.items()
        }
        client = stack.enter_context(redis_connection.connect(bench.redis_url, "bench"))

        def one_run(millions: int) -> Callable[[], float]:
            def run() -> float:
                settings = relay_settings(bench, databases[millions])
                times = run_lifecycle(connections[millions], client, settings, batches)
                claim_times[millions].append(median(times.claim_times) * 1000)
                return times.rows / sum(times.publish_times)

            return run

        for millions in databases:
            one_run(millions)()  # warms up
            claim_times[millions].clear()
        longest_first = sorted(databases, reverse=True)
        drain_rates = bench.measure_in_turn(
            "scale",
            "drain rate, by done rows in the table",
            "rows/s",
            {names[millions]: one_run(millions) for millions in longest_first},
            target="within 10 %",
        )
    drain_rates.extra["curve"] = {
        "by": "done rows in the table",
        "points": [[millions * 1_000_000, drain_rates.median(names[millions])] for millions in databases],
    }
    claims = Figure(
        "scale",
        f"claim of {CLAIMED_AT_ONCE} rows, by done rows in the table",
        "ms",
        higher_is_better=False,
        samples={names[millions]: claim_times[millions] for millions in longest_first},
        target="within 10 %",
        extra={"times": [[millions * 1_000_000, median(claim_times[millions])] for millions in databases]},
    )
    return [drain_rates, claims]
