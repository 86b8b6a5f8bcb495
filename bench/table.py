"""Formats figures as tables for a terminal."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from bench.figure import Figure
from bench.testbed import format_number


def tables(figures: Sequence[Figure], runs: int) -> Group:
    """Returns a table for each figure.

    Args:
        figures: the figures.
        runs: number of runs, for the headings.
    """
    width = max((len(contender) for figure in figures for contender in figure.samples), default=0)
    return Group(*(_table(figure, runs, width) for figure in figures))


def _table(figure: Figure, runs: int, width: int) -> Table:
    target = f"\ntarget: {figure.target}" if figure.target else ""
    table = Table(
        title=f"[bold]{figure.part}[/bold]: {figure.title}{target}",
        title_style="",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("", min_width=width)
    table.add_column(figure.unit, justify="right", min_width=10)
    table.add_column("" if runs == 1 else f"min – max of {runs}", justify="right", min_width=18)  # noqa: RUF001 - a range
    table.add_column("ours better by", justify="right", min_width=9)
    for row in _rows(figure, runs):
        table.add_row(*row)
    return table


def _rows(figure: Figure, runs: int) -> Iterator[tuple[str, ...]]:
    for contender, values in figure.samples.items():
        spread = "" if runs == 1 else f"{format_number(min(values))} – {format_number(max(values))}"  # noqa: RUF001
        ratio = "" if contender == figure.ours else format_ratio(figure.ratio(contender))
        yield contender, format_number(figure.median(contender)), spread, ratio


def format_ratio(ratio: float) -> str:
    """Returns a ratio for people to read, such as `5.8 ×`."""  # noqa: RUF002 - the sign for times
    if ratio >= 20:
        return f"{ratio:,.0f} ×"  # noqa: RUF001 - the sign for times
    return f"{ratio:.1f} ×" if ratio >= 1.05 else f"{ratio:.2f} ×"  # noqa: RUF001
