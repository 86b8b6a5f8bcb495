"""The result of one comparison."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

OURS = "outbox"
"""The name of this project among the contenders."""


@dataclass(frozen=True)
class Figure:
    """One comparison of this project with its peers."""

    part: str
    """Name of the part, as on the command line."""
    title: str
    """What was measured, in a few words."""
    unit: str
    """Unit of all samples: `rows/s`, `ms`, …"""
    higher_is_better: bool
    samples: Mapping[str, list[float]]
    """One number per run, in order, by contender. The first contender is this project."""
    target: str | None = None
    """The target of this project, in words; shown beside the figures."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More data, in JSON types. `bench.charts` draws figures that have `quantiles` and a `rate`, or a `curve` with `by`
    (the label of the x axis) and `points` (a list of [size, rate])."""

    @property
    def ours(self) -> str:
        """The name of the contender that is this project."""
        return next(iter(self.samples))

    def median(self, contender: str) -> float:
        """Returns the median of the samples of a contender."""
        return median(self.samples[contender])

    def ratio(self, peer: str) -> float:
        """Returns how many times better than a peer this project is, by the medians; below 1 it is worse."""
        ours, theirs = self.median(self.ours), self.median(peer)
        better, worse = (ours, theirs) if self.higher_is_better else (theirs, ours)
        return better / worse if worse else float("inf")
