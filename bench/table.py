"""The figures, as people read them on a terminal."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from bench.measure import Figure
from bench.stage import shown


def tables(figures: Sequence[Figure], runs: int) -> Group:
    """Returns a table for each figure.

    Args:
        figures: what was measured.
        runs: how often, for the headings.
    """
    width = max((len(contender) for figure in figures for contender in figure.samples), default=0)
    return Group(*(_table(figure, runs, width) for figure in figures))


def _table(figure: Figure, runs: int, width: int) -> Table:
    target = f"\ntarget: {figure.target}" if figure.target else ""
    made = Table(
        title=f"[bold]{figure.part}[/bold]: {figure.title}{target}",
        title_style="",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    made.add_column("", min_width=width)
    made.add_column(figure.unit, justify="right", min_width=10)
    made.add_column("" if runs == 1 else f"least – most of {runs}", justify="right", min_width=18)  # noqa: RUF001 - a range
    made.add_column("better by", justify="right", min_width=9)
    for row in _rows(figure, runs):
        made.add_row(*row)
    return made


def _rows(figure: Figure, runs: int) -> Iterator[tuple[str, ...]]:
    for contender, values in figure.samples.items():
        spread = "" if runs == 1 else f"{shown(min(values))} – {shown(max(values))}"  # noqa: RUF001
        against = "" if contender == figure.ours else times(figure.ratio(contender))
        yield contender, shown(figure.median(contender)), spread, against


def times(ratio: float) -> str:
    """Returns a ratio as people read it."""
    if ratio >= 20:
        return f"{ratio:,.0f} ×"  # noqa: RUF001 - times
    return f"{ratio:.1f} ×" if ratio >= 1.05 else f"{ratio:.2f} ×"  # noqa: RUF001
