"""What a long backlog does: ten thousand, a hundred thousand and half a million rows of a queue wait in Postgres."""

from collections.abc import Callable
from contextlib import ExitStack

from bench.fill import add_pending
from bench.measure import Figure
from bench.scale.lives import QUEUE, batches_of_a_window, live, settings_of
from bench.stage import Bench
from outbox.runtime import postgres, redis_connection
from outbox.runtime.migrations import migrate

_PARTS = (50, 5)
"""How many times smaller than the longest the others are."""


def of_backlogs(bench: Bench, longest: str, length: int) -> Figure:
    """Measures the drain rate with backlogs of several lengths.

    Args:
        bench: the stage.
        longest: the database with the longest.
        length: how many rows of `QUEUE` there are in it.
    """
    databases = {length // part: bench.database() for part in _PARTS}
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
                lives = live(connections[rows], client, settings_of(bench, databases[rows]), batches_of_a_window(bench))
                add_pending(databases[rows], lives.rows, [QUEUE])  # the next run finds as many
                return lives.rows / sum(lives.publishing)

            return run

        for rows in databases:
            one_run(rows)()  # what a process does once is not counted
        figure = bench.in_turn(
            "scale",
            "drain rate, by rows pending",
            "rows/s",
            {names[rows]: one_run(rows) for rows in sorted(databases, reverse=True)},
        )
    figure.extra["curve"] = {
        "by": "rows pending in the queue",
        "points": [[rows, figure.median(names[rows])] for rows in databases],
    }
    return figure
