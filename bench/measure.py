"""A comparison: what was measured, of whom, and what it comes to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

OURS = "outbox"
"""What this project is called among the contenders."""


@dataclass(frozen=True)
class Figure:
    """One comparison of this project with its peers."""

    part: str
    """The part's name, as on the command line."""
    title: str
    """What is compared, in a few words."""
    unit: str
    """Of all samples: `rows/s`, `ms`, …"""
    higher_is_better: bool
    samples: Mapping[str, list[float]]
    """Contender -> one number per run, in the order of the runs. The first contender is this project."""
    target: str | None = None
    """What this project is to reach, in words; shown beside the figures."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Raw material, JSON only, for notes and for `bench.pictures`, which draws what has `quantiles` and `rate`, or a
    `curve`: what it goes `by`, and its `points` (a list of [size, rate])."""

    @property
    def ours(self) -> str:
        """The contender that is this project."""
        return next(iter(self.samples))

    def median(self, contender: str) -> float:
        """Returns the median of a contender's runs."""
        return median(self.samples[contender])

    def ratio(self, peer: str) -> float:
        """Returns how many times better this project is than a peer, by their medians; below 1 it is worse."""
        ours, theirs = self.median(self.ours), self.median(peer)
        better, worse = (ours, theirs) if self.higher_is_better else (theirs, ours)
        return better / worse if worse else float("inf")
