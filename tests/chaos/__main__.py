"""`python -m tests.chaos`: runs the chaos run once; exits with code 1 if a check fails."""

import asyncio
import json
import logging
import random
import signal
import sys
from pathlib import Path

import click
from rich.console import Console

from tests.chaos import kinds
from tests.chaos.chart import draw_chart
from tests.chaos.evidence import Evidence
from tests.chaos.faults import Kind
from tests.chaos.judge import Failure, judge
from tests.chaos.observer import Observer
from tests.chaos.report import as_json, report, summary, table
from tests.chaos.results_folder import ForeignFolderError, prepare_folder
from tests.chaos.run import Options, run
from tests.chaos.server_faults import CLOCK_JUMP
from tests.support import faked_clock

_MAX_SHOWN = 5
"""Failures printed per check; `results.json` has all of them."""


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--minutes", default=5.0, type=click.FloatRange(min=0.1), help="Minutes of load and faults.")
@click.option("--rate", default=10.0, type=click.FloatRange(min=0.1), help="Users created per second.")
@click.option("--seed", type=int, help="Seed of an earlier run, to repeat its faults.  [default: random]")
@click.option(
    "--folder", default=Path(".chaos"), type=click.Path(file_okay=False, path_type=Path), help="Folder for the results."
)
@click.option("--services", default=2, type=click.IntRange(min=1), help="Number of services.")
@click.option("--relays", default=2, type=click.IntRange(min=1), help="Number of relays.")
@click.option("--workers", default=2, type=click.IntRange(min=1), help="Number of workers.")
@click.option(
    "--kinds", "patterns", multiple=True, metavar="PATTERN", help="Inject only matching faults, such as 'redis.*'."
)
@click.option("--lanes", default=2, type=click.IntRange(min=0), help="Maximum number of faults at a time.")
@click.option("--gap", default=1.5, type=click.FloatRange(min=0.01), help="Mean seconds between two faults of a lane.")
def main(
    *,
    minutes: float,
    rate: float,
    seed: int | None,
    folder: Path,
    services: int,
    relays: int,
    workers: int,
    patterns: tuple[str, ...],
    lanes: int,
    gap: float,
) -> None:
    """Create users while faults are injected, and check that every promise is kept."""
    try:
        chosen = tuple(kinds.select(patterns))
        folder = prepare_folder(folder)
    except (kinds.UnknownKindError, ForeignFolderError) as error:
        raise click.UsageError(str(error)) from None
    if missing := _explain_missing(chosen):
        chosen = tuple(kind for kind in chosen if kind.name != CLOCK_JUMP)
        if not chosen:
            raise click.UsageError(missing)
    seed = random.SystemRandom().randrange(1_000_000) if seed is None else seed
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # faults make Postgres unreachable
    console = Console()
    if missing:
        console.print(missing, markup=False, highlight=False)
    console.print(f"Seed {seed}, {len(chosen)} kinds of faults, results in {folder}")
    counts = {"service": services, "relay": relays, "worker": workers}
    options = Options(minutes, rate, seed, counts, chosen, lanes, gap, folder)
    try:
        evidence, observer = asyncio.run(_run_until_signal(options))
    except asyncio.CancelledError:
        console.print("Stopped.")
        sys.exit(130)
    failures = judge(evidence)
    _show(console, evidence, failures, observer, folder)
    sys.exit(1 if failures else 0)


def _explain_missing(chosen: tuple[Kind, ...]) -> str:
    """Returns which of the kinds cannot run on this machine, and what to install; empty if all can."""
    reason = faked_clock.why_missing() if any(kind.name == CLOCK_JUMP for kind in chosen) else ""
    return f"Skipped {CLOCK_JUMP}: {reason}" if reason else ""


async def _run_until_signal(options: Options) -> tuple[Evidence, Observer]:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await run(options)


def _show(console: Console, evidence: Evidence, failures: list[Failure], observer: Observer, folder: Path) -> None:
    figures = report(evidence, failures)
    for name in ("rows.svg", "rows.png"):
        draw_chart(observer.samples, evidence.faults, evidence.faults_over_at, folder / name)
    (folder / "results.json").write_text(json.dumps(as_json(figures), indent=1))
    console.print(table(figures))
    for name, count in summary(figures).items():
        console.print(f"{count:>8}  {name}")
    checks = list(dict.fromkeys(failure.check for failure in failures))
    for check in checks:
        of_check = [failure for failure in failures if failure.check == check]
        console.print(f"[bold red]{check}: {len(of_check)}[/]")
        for failure in of_check[:_MAX_SHOWN]:
            console.print(f"  {failure.about}: {failure.text}", markup=False, highlight=False)
    if failures:
        console.print(f"FAILED; repeat it with --seed {evidence.seed}")
    else:
        console.print(f"All checks passed (seed {evidence.seed}).")


if __name__ == "__main__":
    main()
