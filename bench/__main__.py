"""`python -m bench`: measures all parts, or those that are named, and prints how they compare."""

import importlib
import importlib.util
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console

from bench.measure import Figure
from bench.results import load_average, results
from bench.stage import Bench, open_bench
from bench.table import tables
from outbox.runtime import logs

PARTS = ("relay", "schedule", "noop", "sleep", "mails", "wait", "api", "idle", "scale")
_ROOT = Path(__file__).parent.parent


@click.command()
@click.argument("parts", nargs=-1, metavar="[PART]...")
@click.option(
    "--smoke", is_flag=True, help="Checks that every part works: tiny sizes, one run. Says nothing about speed."
)
@click.option("--runs", type=click.IntRange(min=1), help="Measurements per contender.  [default: 5]")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for results.json and the pictures. Without it, a full run of all parts writes bench/results.json and "
    "the pictures in docs/, and any other run writes nothing.",
)
def main(parts: tuple[str, ...], runs: int | None, output: Path | None, *, smoke: bool) -> None:
    """Measure this project and what people would use instead, side by side.

    PART is one or more of relay, schedule, noop, sleep, mails, wait, api, idle, scale; without it, all are measured.
    The bench starts its own servers, unless BENCH_DATABASE_URL and BENCH_REDIS_URL name others: it empties that Redis,
    and creates and drops databases on that Postgres.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise click.UsageError(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    chosen = [part for part in PARTS if not parts or part in parts]
    console = Console()
    logs.configure("outbox", "warning", None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or it would leave its servers behind
    begun, load = time.monotonic(), load_average()
    with (
        tempfile.TemporaryDirectory(prefix="outbox-bench-") as folder,
        open_bench(Path(folder), runs=runs or (1 if smoke else 5), smoke=smoke, console=console) as bench,
    ):
        figures = [figure for part in chosen for figure in _measure(bench, part)]
        found = results(bench, figures, load)
    console.print(tables(figures, bench.runs))
    console.print(f"took {time.monotonic() - begun:.0f} s", highlight=False)
    if output is None and not smoke and not parts:
        _write(found, figures, _ROOT / "bench", _ROOT / "docs")
    elif output is not None:
        _write(found, figures, output, output)


def _measure(bench: Bench, part: str) -> list[Figure]:
    figures: list[Figure] = importlib.import_module(f"bench.parts.{part}").measure(bench)
    bench.clear()
    return figures


def _write(found: dict[str, object], figures: list[Figure], folder: Path, pictures: Path) -> None:
    from bench.pictures import draw  # noqa: PLC0415 - matplotlib is slow to import

    for made in (folder, pictures):
        made.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(f"{text}\n", encoding="utf-8")
    draw(figures, pictures)


if __name__ == "__main__":
    main()
