"""Measures the drain rate with 10,000, 100,000 and 500,000 pending rows in a queue."""

from collections.abc import Callable
from contextlib import ExitStack

from bench.figure import Figure
from bench.fill import add_pending
from bench.scale.lifecycle import QUEUE, batches_per_window, relay_settings, run_lifecycle
from bench.testbed import Bench
from outbox.runtime import postgres, redis_connection
from outbox.runtime.migrations import migrate

_DIVISORS = (50, 5)
"""Divisors of the longest backlog for the shorter ones."""


def measure_backlogs(bench: Bench, longest: str, length: int) -> Figure:
    """Measures the drain rate by length of the backlog.

    Args:
        bench: the bench.
        longest: URL of the database with the longest backlog.
        length: number of pending rows of `QUEUE` in it.
    """
    databases = {length // divisor: bench.create_database() for divisor in _DIVISORS}
    for rows, database_url in databases.items():
        migrate(database_url)
        add_pending(database_url, rows, [QUEUE])
    databases[length] = longest
    names = {rows: f"{rows:,} pending rows" for rows in databases}
    with ExitStack() as stack:
        client = stack.enter_context(redis_connection.connect(bench.redis_url, "bench"))
        connections = {rows: stack.enter_context(postgres.connect(url, "bench")) for rows, url in databases.items()}

        def one_run(rows: int) -> Callable[[], float]:
            def run() -> float:
                settings = relay_settings(bench, databases[rows])
                times = run_lifecycle(connections[rows], client, settings, batches_per_window(bench))
                add_pending(databases[rows], times.rows, [QUEUE])  # restores the backlog for the next run
                return times.rows / sum(times.publish_times)

            return run

        for rows in databases:
            one_run(rows)()  # warms up
        figure = bench.measure_in_turn(
            "scale",
            "drain rate, by pending rows",
            "rows/s",
            {names[rows]: one_run(rows) for rows in sorted(databases, reverse=True)},
        )
    figure.extra["curve"] = {
        "by": "pending rows in the queue",
        "points": [[rows, figure.median(names[rows])] for rows in databases],
    }
    return figure
