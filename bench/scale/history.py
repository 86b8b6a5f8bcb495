"""What a long history does: a million pending rows beside none, one or ten million done ones."""

from collections.abc import Callable
from contextlib import ExitStack
from statistics import median

import psycopg

from bench.fill import add_done, add_pending, clone
from bench.measure import Figure
from bench.scale.lives import CLAIMED_AT_ONCE, batches_of_a_window, live, settings_of
from bench.stage import Bench
from outbox.runtime import postgres, redis_connection
from outbox.runtime.migrations import migrate


def histories(bench: Bench, million: int) -> dict[int, str]:
    """Returns databases by the number of done rows in them."""
    bench.empty_redis()
    none = bench.database()
    migrate(none)
    add_pending(none, million)
    databases = {0: none}
    for millions in (1, 10):
        databases[millions] = clone(bench, none)
    for millions in (1, 10):
        add_done(databases[millions], millions * million)
    with psycopg.connect(none, autocommit=True) as connection:
        connection.execute("CHECKPOINT")  # or it would come in the middle
    return databases


def of_histories(bench: Bench, databases: dict[int, str]) -> list[Figure]:
    """Measures the drain rate and the claim time on `histories`."""
    names = {millions: f"{millions} million done rows" if millions else "no done rows" for millions in databases}
    claiming: dict[int, list[float]] = {millions: [] for millions in databases}
    batches = batches_of_a_window(bench)
    with ExitStack() as stack:
        connections = {
            millions: stack.enter_context(postgres.connect(url, "bench")) for millions, url in databases.items()
        }
        client = stack.enter_context(redis_connection.connect(bench.redis_url, "bench"))

        def one_run(millions: int) -> Callable[[], float]:
            def run() -> float:
                lives = live(connections[millions], client, settings_of(bench, databases[millions]), batches)
                claiming[millions].append(median(lives.claiming) * 1000)
                return lives.rows / sum(lives.publishing)

            return run

        for millions in databases:
            one_run(millions)()  # what a process does once is not counted
            claiming[millions].clear()
        longest_first = sorted(databases, reverse=True)
        drained = bench.in_turn(
            "scale",
            "drain rate, by rows done before",
            "rows/s",
            {names[millions]: one_run(millions) for millions in longest_first},
            target="within 10 %",
        )
    drained.extra["curve"] = {
        "by": "rows done, still in the table",
        "points": [[millions * 1_000_000, drained.median(names[millions])] for millions in databases],
    }
    claimed = Figure(
        "scale",
        f"claim of {CLAIMED_AT_ONCE} rows, by rows done before",
        "ms",
        higher_is_better=False,
        samples={names[millions]: claiming[millions] for millions in longest_first},
        target="within 10 %",
        extra={"times": [[millions * 1_000_000, median(claiming[millions])] for millions in databases]},
    )
    return [drained, claimed]
