"""`python -m bench.steady`: shows that the table and its indexes stop growing under a steady load.

It adds rows at a constant rate, with one relay and one worker at default settings except OUTBOX_RETENTION, and samples
the sizes every few seconds. It draws the chart in `docs/deploy.md`. Postgres, and so autovacuum, has its default
settings.
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
from bench.testbed import Bench, open_bench
from outbox.runtime import logs

_ADD_INTERVAL = 0.1
_SAMPLE_INTERVAL = 5.0
"""Seconds."""
_ADD = "INSERT INTO outbox (task, payload) SELECT %s, '{}' FROM generate_series(1, %s)"
_SAMPLE = """
SELECT pg_relation_size('outbox') AS table_bytes,
       pg_indexes_size('outbox') AS index_bytes,
       (SELECT count(*) FROM outbox WHERE status = 'done') AS done,
       (SELECT count(*) FROM outbox WHERE status NOT IN ('done', 'dead')) AS open,
       (SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'outbox') AS dead_tuples,
       (SELECT autovacuum_count FROM pg_stat_user_tables WHERE relname = 'outbox') AS vacuums
"""

Sample = dict[str, Any]


@click.command()
@click.option("--minutes", default=30.0, show_default=True, help="Minutes to add rows for.")
@click.option("--rate", default=500, show_default=True, help="Rows to add per second.")
@click.option("--retention", default=300, show_default=True, help="Seconds to keep done rows.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).parent.parent / "docs" / "steady.png",
    help="File for the chart.  [default: docs/steady.png]",
)
def main(minutes: float, rate: int, retention: int, output: Path) -> None:
    """Add rows at a steady rate, and plot the sizes of the table and its indexes."""
    logs.configure("outbox", "warning", None)
    console = Console()
    with (
        tempfile.TemporaryDirectory(prefix="outbox-steady-") as folder,
        open_bench(Path(folder), runs=1, smoke=False, console=console) as bench,
    ):
        bench.reset()
        with (
            bench.start("relay", OUTBOX_RETENTION=str(retention)),
            bench.start("worker", OUTBOX_HANDLERS="bench.handlers"),
        ):
            samples = _run_load(bench, minutes * 60, rate, console)
    _draw(samples, rate, retention, output)


def _run_load(bench: Bench, seconds: float, rate: int, console: Console) -> list[Sample]:
    """Adds rows for a number of seconds, and returns the samples."""
    samples: list[Sample] = []
    with bench.connect() as connection:
        connection.row_factory = dict_row
        begun = time.monotonic()
        added, next_sample = 0, 0.0
        while (now := time.monotonic() - begun) < seconds:
            missing = int((now + _ADD_INTERVAL) * rate) - added
            connection.execute(_ADD, [NOOP.name, missing])
            added += missing
            if now >= next_sample:
                next_sample = now + _SAMPLE_INTERVAL
                samples.append({"seconds": round(now, 1), "added": added, **_take_sample(connection)})
                if len(samples) % 12 == 1:
                    counts = {name: samples[-1][name] for name in ("added", "done", "open", "dead_tuples", "vacuums")}
                    sizes = {name: samples[-1][name] >> 20 for name in ("table_bytes", "index_bytes")}
                    console.print(f"{now / 60:.0f} min: {counts}, MiB: {sizes}", highlight=False, soft_wrap=True)
            time.sleep(max(0.0, begun + now + _ADD_INTERVAL - time.monotonic()))
    return samples


def _take_sample(connection: psycopg.Connection[Any]) -> Sample:
    sample: Sample | None = connection.execute(_SAMPLE).fetchone()
    assert sample is not None
    return sample


def _draw(samples: list[Sample], rate: int, retention: int, path: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    minutes = [sample["seconds"] / 60 for sample in samples]
    with plt.rc_context({"font.size": 10, "figure.facecolor": "white", "axes.spines.top": False}):
        chart, (sizes, rows) = plt.subplots(2, sharex=True, figsize=(9, 6), layout="constrained")
        for name, key, colour in (("table", "table_bytes", "#0072b2"), ("all indexes", "index_bytes", "#e69f00")):
            sizes.plot(minutes, [sample[key] / 2**20 for sample in samples], label=name, color=colour)
        sizes.set_ylabel("MiB")
        sizes.set_title(f"{rate} rows per second, done rows kept for {retention / 60:g} minutes")
        for name, key, colour in (
            ("done", "done", "#009e73"),
            ("dead versions", "dead_tuples", "#d55e00"),
            ("not done yet", "open", "#0072b2"),
        ):
            rows.plot(minutes, [sample[key] for sample in samples], label=name, color=colour)
        rows.set_ylabel("rows")
        rows.set_xlabel("minutes")
        for axes in (sizes, rows):
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", alpha=0.3)
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        chart.savefig(path, dpi=110)
        plt.close(chart)


if __name__ == "__main__":
    sys.exit(main())
