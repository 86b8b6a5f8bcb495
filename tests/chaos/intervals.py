"""Computes overlaps of time spans."""

from collections.abc import Iterable

Span = tuple[float, float]
"""Start and end, in seconds since the epoch."""


def overlaps(one: Span, other: Span) -> bool:
    """Whether two spans overlap or touch."""
    return one[0] <= other[1] and other[0] <= one[1]


def covered(span: Span, by: Iterable[Span]) -> float:
    """Returns how many seconds of a span the other spans cover together."""
    total, upto = 0.0, span[0]
    for start, end in sorted(by):
        begun, ended = max(start, upto), min(end, span[1])
        if ended > begun:
            total += ended - begun
            upto = ended
    return total


def without(span: Span, gaps: Iterable[Span]) -> list[Span]:
    """Returns the parts of a span outside the gaps; the start of a gap belongs to the part before it."""
    left: list[Span] = []
    start = span[0]
    for begin, end in sorted(gaps):
        if end <= start or begin >= span[1]:
            continue
        if begin >= start:
            left.append((start, begin))
        start = max(start, end)
    if start <= span[1]:
        left.append((start, span[1]))
    return left
