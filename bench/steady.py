"""A steady load for a long time: do the table and its indexes stop growing?

`python -m bench.steady` adds rows at a set rate, with one relay and one worker at default settings, but for the time
that `done` rows are kept, and looks at the sizes every few seconds. It draws the picture that `docs/deploy.md` shows.
Postgres runs with its default settings: autovacuum does what it does for everybody.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import psycopg
from psycopg.rows import dict_row
from rich.console import Console

from bench.handlers import NOOP
from bench.stage import Bench, open_bench
from outbox.runtime import logs

_ADD_EVERY = 0.1
_LOOK_EVERY = 5.0
_ADD = "INSERT INTO outbox (task, payload) SELECT %s, '{}' FROM generate_series(1, %s)"
_LOOK = """
SELECT pg_relation_size('outbox') AS table_bytes,
       pg_indexes_size('outbox') AS index_bytes,
       (SELECT count(*) FROM outbox WHERE status = 'done') AS done,
       (SELECT count(*) FROM outbox WHERE status NOT IN ('done', 'dead')) AS open,
       (SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'outbox') AS dead_tuples,
       (SELECT autovacuum_count FROM pg_stat_user_tables WHERE relname = 'outbox') AS vacuums
"""

Look = dict[str, Any]


@click.command()
@click.option("--minutes", default=30.0, show_default=True, help="Minutes during which rows are added.")
@click.option("--rate", default=500, show_default=True, help="Rows per second.")
@click.option("--retention", default=300, show_default=True, help="Seconds that done rows are kept.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).parent.parent / "docs" / "steady.png",
    help="File for the picture.  [default: docs/steady.png]",
)
def main(minutes: float, rate: int, retention: int, output: Path) -> None:
    """Add rows at a steady rate, and show how large the table and its indexes get."""
    logs.configure("outbox", "warning", None)
    console = Console()
    with (
        tempfile.TemporaryDirectory(prefix="outbox-steady-") as folder,
        open_bench(Path(folder), runs=1, smoke=False, console=console) as bench,
    ):
        bench.fresh()
        with (
            bench.start("relay", OUTBOX_RETENTION=str(retention)),
            bench.start("worker", OUTBOX_HANDLERS="bench.handlers"),
        ):
            looks = _load(bench, minutes * 60, rate, console)
    _draw(looks, rate, retention, output)


def _load(bench: Bench, seconds: float, rate: int, console: Console) -> list[Look]:
    """Adds rows for so long, and returns what was seen meanwhile."""
    looks: list[Look] = []
    with bench.connect() as connection:
        connection.row_factory = dict_row
        begun = time.monotonic()
        added, next_look = 0, 0.0
        while (now := time.monotonic() - begun) < seconds:
            missing = int((now + _ADD_EVERY) * rate) - added
            connection.execute(_ADD, [NOOP.name, missing])
            added += missing
            if now >= next_look:
                next_look = now + _LOOK_EVERY
                looks.append({"seconds": round(now, 1), "added": added, **_looked(connection)})
                if len(looks) % 12 == 1:
                    shown = {name: looks[-1][name] for name in ("added", "done", "open", "dead_tuples", "vacuums")}
                    sizes = {name: looks[-1][name] >> 20 for name in ("table_bytes", "index_bytes")}
                    console.print(f"{now / 60:.0f} min: {shown}, MiB: {sizes}", highlight=False, soft_wrap=True)
            time.sleep(max(0.0, begun + now + _ADD_EVERY - time.monotonic()))
    return looks


def _looked(connection: psycopg.Connection[Any]) -> Look:
    look: Look | None = connection.execute(_LOOK).fetchone()
    assert look is not None
    return look


def _draw(looks: list[Look], rate: int, retention: int, path: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    minutes = [look["seconds"] / 60 for look in looks]
    with plt.rc_context({"font.size": 10, "figure.facecolor": "white", "axes.spines.top": False}):
        picture, (sizes, rows) = plt.subplots(2, sharex=True, figsize=(9, 6), layout="constrained")
        for name, key, colour in (("table", "table_bytes", "#0072b2"), ("all indexes", "index_bytes", "#e69f00")):
            sizes.plot(minutes, [look[key] / 2**20 for look in looks], label=name, color=colour)
        sizes.set_ylabel("MiB")
        sizes.set_title(f"{rate} rows a second, done rows kept for {retention / 60:g} minutes")
        for name, key, colour in (
            ("done", "done", "#009e73"),
            ("dead versions", "dead_tuples", "#d55e00"),
            ("not done yet", "open", "#0072b2"),
        ):
            rows.plot(minutes, [look[key] for look in looks], label=name, color=colour)
        rows.set_ylabel("rows")
        rows.set_xlabel("minutes")
        for axes in (sizes, rows):
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", alpha=0.3)
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        picture.savefig(path, dpi=110)
        plt.close(picture)


if __name__ == "__main__":
    sys.exit(main())
