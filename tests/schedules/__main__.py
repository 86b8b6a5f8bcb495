"""`python -m tests.schedules`: random schedules until the time is over; exit code 1 if one broke a rule."""

import random
import sys
import time
from collections import Counter

import click
from rich.console import Console

from outbox.runtime import logs
from tests.schedules.mutants import MUTANTS, mutated
from tests.schedules.schedule import Verdict, run
from tests.schedules.stage import stage


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--seconds", default=60.0, type=click.FloatRange(min=1), help="Seconds during which schedules start.")
@click.option("--schedules", type=click.IntRange(min=1), help="Upper bound of schedules.  [default: none]")
@click.option("--seed", type=int, help="Repeats a run.  [default: random]")
@click.option("--first", default=1, type=click.IntRange(min=1), help="Number of the first schedule.")
@click.option("--mutant", type=click.Choice(sorted(MUTANTS)), help="Breaks a statement; the judge must notice.")
@click.option("--trace", is_flag=True, help="Prints every step of every schedule.")
def main(
    *, seconds: float, schedules: int | None, seed: int | None, first: int, mutant: str | None, trace: bool
) -> None:
    """Run the project's statements step by step in random order, with faults, and judge every transition of a row."""
    seed = random.SystemRandom().randrange(1_000_000) if seed is None else seed
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"Seed {seed}")
    logs.configure("schedules", "error", "console")
    counts: Counter[str] = Counter()
    with stage() as opened, mutated(mutant):
        begun = time.monotonic()
        number = first
        while time.monotonic() - begun < seconds and (schedules is None or number < first + schedules):
            verdict = run(opened, f"{seed} {number}")
            counts += verdict.counts
            if verdict.violations or trace:
                _show(console, verdict)
            if verdict.violations:
                repeat = f"--seed {seed} --first {number} --schedules 1" + (f" --mutant {mutant}" if mutant else "")
                console.print(f"FAILED in schedule {number}; repeat it with {repeat}")
                sys.exit(1)
            number += 1
        taken = time.monotonic() - begun
    for name, count in sorted(counts.items()):
        console.print(f"{count:>9}  {name}")
    ran = number - first
    console.print(f"All that must hold did hold in {ran} schedules, {ran / taken:.1f} a second (seed {seed}).")


def _show(console: Console, verdict: Verdict) -> None:
    begun = verdict.trace[0][0]
    lines = [*verdict.trace, *((at, "VIOLATION", text) for at, text in verdict.violations)]
    for at, who, what in sorted(lines):
        console.print(f"{at - begun:8.4f}  {who:<16} {what}")
    console.print()
    for _, text in verdict.violations:
        console.print(text)


if __name__ == "__main__":
    main()
