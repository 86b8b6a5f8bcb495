"""Spans of time, and how they overlap."""

from collections.abc import Iterable

Span = tuple[float, float]
"""Start and end, in seconds since the epoch."""


def overlaps(one: Span, other: Span) -> bool:
    """Whether two spans have a moment in common."""
    return one[0] <= other[1] and other[0] <= one[1]


def covered(span: Span, by: Iterable[Span]) -> float:
    """Returns how many seconds of a span the others cover together."""
    total, upto = 0.0, span[0]
    for start, end in sorted(by):
        begun, ended = max(start, upto), min(end, span[1])
        if ended > begun:
            total += ended - begun
            upto = ended
    return total


def without(span: Span, gaps: Iterable[Span]) -> list[Span]:
    """Returns what is left of a span; a gap's first moment belongs to what is left."""
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
