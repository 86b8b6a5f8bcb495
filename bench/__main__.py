"""`python -m bench`: measures all parts, or the named ones, and prints the comparison."""

import importlib
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console

from bench.figure import Figure
from bench.results import collect_results, load_average
from bench.table import tables
from bench.testbed import Bench, open_bench
from outbox.runtime import logs

PARTS = ("relay", "schedule", "noop", "sleep", "mails", "wait", "api", "idle", "scale")
_ROOT = Path(__file__).parent.parent


@click.command()
@click.argument("parts", nargs=-1, metavar="[PART]...")
@click.option(
    "--smoke", is_flag=True, help="Check that every part works: tiny sizes, one run. The figures mean nothing."
)
@click.option("--runs", type=click.IntRange(min=1), help="Number of runs of each contender.  [default: 5]")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for results.json and the charts. Without this option, a full run of all parts writes "
    "bench/results.json and the charts in docs/, and any other run writes nothing.",
)
def main(parts: tuple[str, ...], runs: int | None, output: Path | None, *, smoke: bool) -> None:
    """Measure this project and its alternatives, side by side.

    PART is relay, schedule, noop, sleep, mails, wait, api, idle or scale, and may be repeated. The default is all of
    them. The bench starts its own servers, unless BENCH_DATABASE_URL and BENCH_REDIS_URL name others. It empties that
    Redis, and creates and drops databases on that Postgres.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise click.UsageError(f"unknown part: {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    chosen = [part for part in PARTS if not parts or part in parts]
    console = Console()
    logs.configure("outbox", "warning", None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds the stack, which stops the servers
    begun, load_before = time.monotonic(), load_average()
    with (
        tempfile.TemporaryDirectory(prefix="outbox-bench-") as folder,
        open_bench(Path(folder), runs=runs or (1 if smoke else 5), smoke=smoke, console=console) as bench,
    ):
        figures = [figure for part in chosen for figure in _measure(bench, part)]
        results = collect_results(bench, figures, load_before)
    console.print(tables(figures, bench.runs))
    console.print(f"took {time.monotonic() - begun:.0f} s", highlight=False)
    if output is None and not smoke and not parts:
        _write(results, figures, _ROOT / "bench", _ROOT / "docs")
    elif output is not None:
        _write(results, figures, output, output)


def _measure(bench: Bench, part: str) -> list[Figure]:
    figures: list[Figure] = importlib.import_module(f"bench.parts.{part}").measure(bench)
    bench.clear()
    return figures


def _write(results: dict[str, object], figures: list[Figure], results_folder: Path, chart_folder: Path) -> None:
    from bench.charts import draw  # noqa: PLC0415 - matplotlib is slow to import

    for folder in (results_folder, chart_folder):
        folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (results_folder / "results.json").write_text(f"{text}\n", encoding="utf-8")
    draw(figures, chart_folder)


if __name__ == "__main__":
    main()
