"""Outcomes of attempts, including attempts that did not begin or did not end."""

from collections.abc import Callable
from typing import NamedTuple

from outbox.row import Status
from outbox.rq_jobs import Delivery
from outbox_worker.claim import Claim


class Outcome(NamedTuple):
    """The outcome of an attempt, as it is written to the row."""

    delivery: Delivery
    status: Status
    """Done, pending or dead."""
    attempts: int | None
    """The number of attempts that count; None: one less than the row has, because the last did not begin."""
    delay: float = 0.0
    """Seconds until the next attempt may begin."""
    error: str | None = None
    unhandled: bool = False
    """Whether this worker cannot handle the row, but another may."""


class Attempted(NamedTuple):
    """An attempt that has ended."""

    outcome: Outcome
    report: Callable[[], None] | None
    """Logs the attempt; None if there is nothing to log. Called after the outcome is offered: logging may fail."""


def given_back(claim: Claim) -> Outcome:
    """Returns the outcome of a row whose handler has not begun: pending, and the attempt does not count."""
    return Outcome(claim.delivery, Status.PENDING, claim.attempt - 1)


def unanswered(delivery: Delivery) -> Outcome:
    """Returns the outcome of a row that this worker may have claimed and has not begun: the claim got no answer."""
    return Outcome(delivery, Status.PENDING, None)


def cut_short(claim: Claim, error: str, leaving: float, backoff: float = 0.0) -> Outcome:
    """Returns the outcome of a row whose handler has begun and will not end before its worker does.

    The attempt counts, or a row whose handler never ends would be tried without end.

    Args:
        claim: the row.
        error: why it was cut short.
        leaving: seconds until the process has exited and with it the handler. An operator's retry begins no earlier.
        backoff: further seconds until the next attempt, if there is one.
    """
    if claim.attempt > claim.max_retries:
        return Outcome(claim.delivery, Status.DEAD, claim.attempt, leaving, error)
    return Outcome(claim.delivery, Status.PENDING, claim.attempt, leaving + backoff, error)
