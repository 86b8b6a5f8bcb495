"""Draws the rows by state over time, with the faults below."""

from pathlib import Path

import matplotlib as mpl
import numpy as np

from tests.chaos.evidence import Fault

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_STATES = {"running": "#fc8d62", "enqueued": "#66c2a5", "pending": "#8da0cb", "not due": "#e3e3e3"}
_LABELS = {"enqueued": "enqueued, due", "pending": "pending, due", "not due": "not due: first delay, or retry"}
_TARGETS = {
    "service": "#7570b3",
    "relay": "#e7298a",
    "worker": "#d95f02",
    "redis": "#a6761d",
    "postgres": "#1f78b4",
    "mail": "#66a61e",
}
_SHORTEST = 0.4
"""Seconds; a shorter bar would not be visible."""

Samples = list[tuple[float, dict[str, int] | None]]


def draw_chart(samples: Samples, faults: list[Fault], faults_over_at: float, path: Path) -> None:
    """Draws a run.

    Args:
        samples: rows by state over time; None while Postgres is away.
        faults: the faults to mark.
        faults_over_at: when the last fault was over.
        path: the file to write; its extension is the format.
    """
    begun = samples[0][0]
    figure, (rows, strip) = plt.subplots(
        2, 1, figsize=(13, 6.5), sharex=True, height_ratios=(3, 1.3), layout="constrained"
    )
    _draw_rows(rows, samples, begun)
    _draw_faults(strip, faults, begun)
    for axes in (rows, strip):
        axes.axvline((faults_over_at - begun) / 60, color="black", linewidth=0.8, linestyle=":")
    rows.annotate(
        "no more faults",
        ((faults_over_at - begun) / 60, 1),
        xycoords=("data", "axes fraction"),
        fontsize=8,
        xytext=(3, -10),
        textcoords="offset points",
    )
    strip.set_xlabel("minutes")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_rows(axes: Axes, samples: Samples, begun: float) -> None:
    times = np.array([(at - begun) / 60 for at, _ in samples])
    away = np.array([states is None for _, states in samples])
    stacked = np.array(
        [[np.nan if states is None else states.get(name, 0) for _, states in samples] for name in _STATES]
    )
    bottom = np.zeros(len(samples))
    for (name, colour), counts in zip(_STATES.items(), stacked, strict=True):
        axes.fill_between(
            times, bottom, bottom + counts, where=~away, color=colour, label=_LABELS.get(name, name), linewidth=0
        )
        bottom = bottom + counts
    dead = [np.nan if states is None else states.get("dead", 0) for _, states in samples]
    axes.plot(times, dead, color="black", linewidth=1, label="dead, in all")
    axes.set_ylabel("rows not done, by state")
    axes.set_ylim(bottom=0)
    done = axes.twinx()
    done.plot(
        times,
        [np.nan if states is None else states.get("done", 0) for _, states in samples],
        color="#444444",
        linewidth=1.2,
        linestyle="--",
        label="done, in all (right)",
    )
    done.set_ylabel("rows done")
    done.set_ylim(bottom=0)
    handles = [*axes.get_legend_handles_labels()[0], *done.get_legend_handles_labels()[0]]
    axes.legend(handles, [str(handle.get_label()) for handle in handles], loc="upper left", fontsize=8, ncols=6)
    axes.set_title("Rows by state while faults are injected (gaps: Postgres is away)")


def _draw_faults(axes: Axes, faults: list[Fault], begun: float) -> None:
    for place, (target, colour) in enumerate(_TARGETS.items()):
        spans = [
            ((fault.start - begun) / 60, max(fault.end - fault.start, _SHORTEST) / 60)
            for fault in faults
            if target in fault.targets
        ]
        axes.broken_barh(spans, (place - 0.4, 0.8), color=colour, linewidth=0)
    axes.set_yticks(range(len(_TARGETS)), list(_TARGETS))
    axes.set_ylim(len(_TARGETS) - 0.4, -0.6)
    axes.set_ylabel("faults")
