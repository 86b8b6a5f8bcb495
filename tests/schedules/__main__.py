"""`python -m tests.schedules`: runs random schedules for some time; exits with code 1 if one breaks a rule."""

import random
import sys
import time
from collections import Counter

import click
from rich.console import Console

from outbox.runtime import logs
from tests.schedules.database import open_database
from tests.schedules.mutants import MUTANTS, mutated
from tests.schedules.schedule import Verdict, run


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--seconds", default=60.0, type=click.FloatRange(min=1), help="Seconds in which schedules are started.")
@click.option("--schedules", type=click.IntRange(min=1), help="Maximum number of schedules.  [default: no limit]")
@click.option("--seed", type=int, help="Seed of an earlier run, to repeat it.  [default: random]")
@click.option("--first", default=1, type=click.IntRange(min=1), help="Number of the first schedule.")
@click.option("--mutant", type=click.Choice(sorted(MUTANTS)), help="Break a statement, which the judge must notice.")
@click.option("--trace", is_flag=True, help="Print every step of every schedule.")
def main(
    *, seconds: float, schedules: int | None, seed: int | None, first: int, mutant: str | None, trace: bool
) -> None:
    """Run the product's statements one at a time in random order, with faults, and judge every transition of a row."""
    seed = random.SystemRandom().randrange(1_000_000) if seed is None else seed
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"Seed {seed}")
    logs.configure("schedules", "error", "console")
    counts: Counter[str] = Counter()
    with open_database() as opened, mutated(mutant):
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
    console.print(f"All rules held in {ran} schedules, {ran / taken:.1f} per second (seed {seed}).")


def _show(console: Console, verdict: Verdict) -> None:
    begun = verdict.trace[0][0]
    lines = [*verdict.trace, *((at, "VIOLATION", text) for at, text in verdict.violations)]
    for at, actor, text in sorted(lines):
        console.print(f"{at - begun:8.4f}  {actor:<16} {text}")
    console.print()
    for _, text in verdict.violations:
        console.print(text)


if __name__ == "__main__":
    main()
