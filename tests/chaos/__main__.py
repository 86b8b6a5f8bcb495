"""`python -m tests.chaos`: one chaos run; exit code 1 if anything that must hold did not."""

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
from tests.chaos.evidence import Evidence
from tests.chaos.faults import Kind
from tests.chaos.folder import ForeignFolderError, emptied
from tests.chaos.judge import Failure, judge
from tests.chaos.observer import Observer
from tests.chaos.picture import draw
from tests.chaos.report import as_json, report, summary, table
from tests.chaos.run import Options, run
from tests.chaos.server_faults import CLOCK_JUMP
from tests.support import faked_clock

_SHOWN = 5
"""Failures of one check that are printed; all are in the JSON."""


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--minutes", default=5.0, type=click.FloatRange(min=0.1), help="Minutes during which faults are injected."
)
@click.option("--rate", default=10.0, type=click.FloatRange(min=0.1), help="Users created per second.")
@click.option("--seed", type=int, help="Repeats the faults of a run.  [default: random]")
@click.option(
    "--folder", default=Path(".chaos"), type=click.Path(file_okay=False, path_type=Path), help="Folder for results."
)
@click.option("--services", default=2, type=click.IntRange(min=1))
@click.option("--relays", default=2, type=click.IntRange(min=1))
@click.option("--workers", default=2, type=click.IntRange(min=1))
@click.option(
    "--kinds", "patterns", multiple=True, metavar="PATTERN", help="Injects only these faults, as in 'redis.*'."
)
@click.option("--lanes", default=2, type=click.IntRange(min=0), help="Upper bound of faults at a time.")
@click.option("--gap", default=1.5, type=click.FloatRange(min=0.01), help="Mean seconds between the faults of a lane.")
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
    """Create users while faults strike everything else, and check that every promise was kept."""
    try:
        chosen = tuple(kinds.chosen(patterns))
        folder = emptied(folder)
    except (kinds.UnknownKindError, ForeignFolderError) as error:
        raise click.UsageError(str(error)) from None
    if missing := _missing(chosen):
        chosen = tuple(kind for kind in chosen if kind.name != CLOCK_JUMP)
        if not chosen:
            raise click.UsageError(missing)
    seed = random.SystemRandom().randrange(1_000_000) if seed is None else seed
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # Postgres is away on purpose
    console = Console()
    if missing:
        console.print(missing, markup=False, highlight=False)
    console.print(f"Seed {seed}; {len(chosen)} kinds of faults; results go to {folder}")
    counts = {"service": services, "relay": relays, "worker": workers}
    options = Options(minutes, rate, seed, counts, chosen, lanes, gap, folder)
    try:
        evidence, observer = asyncio.run(_stoppable(options))
    except asyncio.CancelledError:
        console.print("Stopped.")
        sys.exit(130)
    failures = judge(evidence)
    _show(console, evidence, failures, observer, folder)
    sys.exit(1 if failures else 0)


def _missing(chosen: tuple[Kind, ...]) -> str:
    """Says which of the kinds this machine cannot do, and what to install."""
    reason = faked_clock.why_missing() if any(kind.name == CLOCK_JUMP for kind in chosen) else ""
    return f"Without {CLOCK_JUMP}: {reason}" if reason else ""


async def _stoppable(options: Options) -> tuple[Evidence, Observer]:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await run(options)


def _show(console: Console, evidence: Evidence, failures: list[Failure], observer: Observer, folder: Path) -> None:
    made = report(evidence, failures)
    draw(observer.samples, evidence.faults, evidence.calm, folder / "rows.svg")
    draw(observer.samples, evidence.faults, evidence.calm, folder / "rows.png")
    (folder / "results.json").write_text(json.dumps(as_json(made), indent=1))
    console.print(table(made))
    for name, count in summary(made).items():
        console.print(f"{count:>8}  {name}")
    checks = list(dict.fromkeys(failure.check for failure in failures))
    for check in checks:
        of_check = [failure for failure in failures if failure.check == check]
        console.print(f"[bold red]{check}: {len(of_check)}[/]")
        for failure in of_check[:_SHOWN]:
            console.print(f"  {failure.about}: {failure.text}", markup=False, highlight=False)
    if failures:
        console.print(f"FAILED; repeat it with --seed {evidence.seed}")
    else:
        console.print(f"All that must hold did hold (seed {evidence.seed}).")


if __name__ == "__main__":
    main()
