"""One attempt at one row: its handler, its time limit, and what becomes of it."""

import time
from dataclasses import dataclass
from typing import Literal

import structlog
from rq.timeouts import JobTimeoutException, TimerDeathPenalty

from outbox import logs
from outbox.backoff import retry_delay
from outbox.context import Context
from outbox.errors import PayloadError, SkipRetry
from outbox.jobs import Delivery
from outbox.outage import one_line
from outbox.task import Registry
from worker.claim import Claim

UNKNOWN_TASK_DELAY = 15.0
"""Seconds until a task that this worker does not know is offered again, to a newer worker perhaps."""


@dataclass(frozen=True)
class Outcome:
    """What became of an attempt, as it is written to the row."""

    delivery: Delivery
    status: Literal["done", "pending", "dead"]
    attempts: int
    """How many count from now on."""
    delay: float = 0.0
    """Seconds until the next attempt, where there is one."""
    error: str | None = None


def attempt(claim: Claim, registry: Registry, context: Context) -> Outcome:
    """Runs the row's handler and returns what became of it; whatever the handler raises ends here."""
    with structlog.contextvars.bound_contextvars(
        type=claim.task, row=claim.delivery.row, delivery=claim.delivery.number, request_id=claim.request_id
    ):
        try:
            return _attempt(claim, registry, context)
        except Exception as error:  # noqa: BLE001 - the time limit strikes anywhere, even between two lines of ours
            return _failed(claim, error, logs.get())


def _attempt(claim: Claim, registry: Registry, context: Context) -> Outcome:
    log = logs.get()
    handler = registry.get(claim.task)
    if handler is None:
        log.error("task is unknown to this worker", next_try=UNKNOWN_TASK_DELAY)
        # It does not count: during a deploy this may happen many times before a newer worker gets it.
        return Outcome(
            claim.delivery,
            "pending",
            claim.attempt - 1,
            UNKNOWN_TASK_DELAY,
            f"no handler for task {claim.task!r}: the worker was older than the row, or OUTBOX_HANDLERS misses it",
        )
    started = time.monotonic()
    try:
        payload = handler.task.parse(claim.payload)
        with TimerDeathPenalty(claim.timeout, JobTimeoutException):
            fields = handler.function(payload, context)
    except (SkipRetry, PayloadError) as error:
        log.error("process task failed", error=str(error), attempt=claim.attempt, next_try=None)
        return Outcome(claim.delivery, "dead", claim.attempt, error=one_line(error))
    duration = round(time.monotonic() - started, 6)
    log.info("processed task", payload=claim.payload, **(fields or {}), duration=duration)
    return Outcome(claim.delivery, "done", claim.attempt)


def _failed(claim: Claim, error: BaseException, log: logs.Logger) -> Outcome:
    if isinstance(error, JobTimeoutException):
        text = f"the attempt took longer than its {claim.timeout} s"
    else:
        text = one_line(error)
    if claim.attempt > claim.max_retries:
        log.error("process task failed", error=text, attempt=claim.attempt, next_try=None)
        return Outcome(claim.delivery, "dead", claim.attempt, error=text)
    delay = retry_delay(claim.attempt)
    log.warning("process task failed", error=text, attempt=claim.attempt, next_try=round(delay, 1))
    return Outcome(claim.delivery, "pending", claim.attempt, delay, text)
