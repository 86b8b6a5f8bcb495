"""Draws the charts of the bench: ratios to the peers, latency of mails, and rates by size.

`python -m bench.charts results.json FOLDER` draws them again from the results of a run.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from bench.figure import Figure

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

# The palette of Okabe and Ito, which is safe for all kinds of colour vision.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
_BETTER, _WORSE = _COLOURS[0], _COLOURS[4]

_PARTS_WITH_PEERS = ("relay", "schedule", "noop", "sleep", "mails", "wait")
"""Parts that compare with peers. The others compare this project with itself or with an upper bound."""
_VARIANTS = ("polling only",)
"""Contenders that are this project with other settings."""


def draw(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Draws bench-ratios.png, bench-wait.png and bench-scale.png, each if it has figures.

    Args:
        figures: the figures; parts may be missing.
        folder: an existing folder for the charts.

    Returns:
        The paths of the charts that were drawn.
    """
    charts = {"bench-ratios.png": _draw_ratios, "bench-wait.png": _draw_waits, "bench-scale.png": _draw_scale}
    with plt.rc_context({"font.size": 10, "figure.facecolor": "white", "axes.spines.top": False}):
        return [folder / name for name, draw_chart in charts.items() if draw_chart(figures, folder / name)]


def _draw_ratios(figures: Sequence[Figure], path: Path) -> bool:
    groups = [
        (figure, peers)
        for figure in figures
        if figure.part in _PARTS_WITH_PEERS
        and not figure.title.endswith(", worst")  # a single row of each run, so mostly chance
        and (peers := [name for name in figure.samples if _is_peer(figure, name)])
    ]
    if not groups:
        return False
    ratios = [figure.ratio(peer) for figure, peers in groups for peer in peers]
    lines = len(ratios) + 1.3 * len(groups)
    chart, axes = plt.subplots(figsize=(9, 0.9 + 0.29 * lines), layout="constrained")
    positions, labels, position = [], [], 0.0
    for figure, peers in groups:
        axes.text(
            0.01,
            position,
            figure.title,
            transform=axes.get_yaxis_transform(),
            weight="bold",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # hides the line at 1 behind the title
        )
        for peer in peers:
            position += 1
            positions.append(position)
            labels.append(peer)
        position += 1.3
    # Bars start at 1: those of worse ratios point to the left.
    axes.barh(
        positions, [ratio - 1 for ratio in ratios], left=1, height=0.75, color=[_bar_colour(ratio) for ratio in ratios]
    )
    for at, ratio in zip(positions, ratios, strict=True):
        axes.annotate(
            _format_ratio(ratio),
            (ratio, at),
            xytext=(4 if ratio >= 1 else -4, 0),
            textcoords="offset points",
            ha="left" if ratio >= 1 else "right",
            va="center",
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, min(ratios) / 1.8), max(2.0, max(ratios) * 1.8))
    axes.set_yticks(positions, labels)
    axes.set_ylim(position - 0.6, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("how many times better this project is, by the medians of all runs (left of 1: worse)")
    axes.spines["right"].set_visible(False)
    return _save(chart, path)


def _is_peer(figure: Figure, contender: str) -> bool:
    return contender != figure.ours and contender not in _VARIANTS and 0 < figure.ratio(contender) < np.inf


def _bar_colour(ratio: float) -> str:
    return _BETTER if ratio >= 1 else _WORSE


def _format_ratio(ratio: float) -> str:
    return f"{ratio:.2f} ×" if ratio < 2 else f"{ratio:.1f} ×" if ratio < 20 else f"{ratio:,.0f} ×"  # noqa: RUF001 - the sign for times


def _draw_waits(figures: Sequence[Figure], path: Path) -> bool:
    drawn = sorted(
        (figure for figure in figures if "quantiles" in figure.extra), key=lambda figure: figure.extra["rate"]
    )
    if not drawn:
        return False
    chart, panels = plt.subplots(
        1, len(drawn), figsize=(1.5 + 3.6 * len(drawn), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, figure in zip(panels[0], drawn, strict=True):
        for colour, (name, waits) in zip(_COLOURS, figure.extra["quantiles"].items(), strict=False):
            axes.plot(np.linspace(0, 100, len(waits)), waits, label=name, color=colour, linewidth=2)
        axes.set_yscale("log")
        axes.set_title(f"{figure.extra['rate']} users per second", fontsize=10)
        axes.set_xlabel("percentile of mails")
        axes.set_xticks([0, 25, 50, 75, 99], ["0", "25", "50", "75", "99"])
        _grid(axes)
    panels[0][0].yaxis.set_major_formatter(FuncFormatter(_duration))
    panels[0][0].set_ylabel("commit to mail server")
    panels[0][-1].legend(loc="lower right", fontsize=9, framealpha=0.9)
    return _save(chart, path)


def _duration(milliseconds: float, _: object) -> str:
    return f"{milliseconds:g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:g} s"


def _draw_scale(figures: Sequence[Figure], path: Path) -> bool:
    drawn = [figure for figure in figures if "curve" in figure.extra]
    if not drawn:
        return False
    rows = -(-len(drawn) // 2)
    chart, panels = plt.subplots(rows, 2, figsize=(9, 3.6 * rows), squeeze=False, layout="constrained")
    for axes, colour, figure in zip(panels.flat, _COLOURS, drawn, strict=False):
        points = figure.extra["curve"]["points"]
        rates = [rate for _, rate in points]
        axes.errorbar(
            range(len(points)),
            rates,
            yerr=_spread(figure, rates),
            color=colour,
            marker="o",
            linewidth=2,
            capsize=4,
        )
        axes.set_title(figure.title, fontsize=10)
        axes.set_xticks(range(len(points)), [_count(number) for number, _ in points])
        axes.set_xlim(-0.4, len(points) - 0.6)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(figure.extra["curve"]["by"])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _grid(axes)
    for empty in panels.flat[len(drawn) :]:
        empty.set_visible(False)
    chart.supylabel("rows per second: median, min, max", fontsize=10)
    return _save(chart, path)


def _spread(figure: Figure, medians: list[float]) -> list[list[float]]:
    """Returns the distance from each median to the minimum and maximum of its runs.

    Looks the runs up by their median, because contenders and points are in different orders.
    """
    samples = {figure.median(name): values for name, values in figure.samples.items()}
    runs = [samples.get(value, [value]) for value in medians]
    return [
        [value - min(values) for value, values in zip(medians, runs, strict=True)],
        [max(values) - value for value, values in zip(medians, runs, strict=True)],
    ]


def _count(number: int) -> str:
    return f"{number / 1_000_000:g} million" if number >= 1_000_000 else f"{number:,}"


def _grid(axes: Axes) -> None:
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["right"].set_visible(False)


def _save(chart: Any, path: Path) -> bool:
    chart.savefig(path, dpi=120)
    plt.close(chart)
    return True


def main() -> None:
    """Draws the charts from a results.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.charts")
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    names = ("part", "title", "unit", "higher_is_better", "samples", "target", "extra")
    figures = json.loads(arguments.results.read_text(encoding="utf-8"))["figures"]
    draw([Figure(**{name: figure[name] for name in names}) for figure in figures], arguments.folder)


if __name__ == "__main__":
    main()
