"""One attempt at one row: its handler, its time limit, and what becomes of it."""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from contextvars import copy_context
from typing import Literal, NamedTuple

from outbox import logs
from outbox.backoff import retry_delay
from outbox.context import Context
from outbox.errors import PayloadError, SkipRetry
from outbox.jobs import Delivery
from outbox.outage import one_line
from outbox.registry import Registry
from worker.claim import Claim
from worker.limit import TimeLimitReached, call_within

UNKNOWN_TASK_DELAY = 15.0
"""Seconds until a task that this worker does not know is offered again, to a newer worker perhaps."""


class Outcome(NamedTuple):
    """What became of an attempt, as it is written to the row."""

    delivery: Delivery
    status: Literal["done", "pending", "dead"]
    attempts: int
    """How many count from now on."""
    delay: float = 0.0
    """Seconds until the next attempt, where there is one."""
    error: str | None = None


def given_back(claim: Claim) -> Outcome:
    """Returns the outcome of a row whose handler has not begun: another worker may have it, and no attempt counts."""
    return Outcome(claim.delivery, "pending", claim.attempt - 1)


def attempt(claim: Claim, registry: Registry, context: Context) -> Outcome:
    """Runs the row's handler and returns what became of it; whatever the handler raises ends here."""
    # In a context of its own: what a handler binds there, for the log or otherwise, is no other row's.
    return copy_context().run(_attempt_in_context, claim, registry, context)


def _attempt_in_context(claim: Claim, registry: Registry, context: Context) -> Outcome:
    row, delivery = claim.delivery
    with logs.bound(type=claim.task, row=row, delivery=delivery, request_id=claim.request_id):
        return _attempt(claim, registry, context)


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
        fields = call_within(claim.timeout, handler.function, payload, context)
    except (SkipRetry, PayloadError) as error:
        # A payload or a mail server may have made the text long, or put into it what Postgres cannot store.
        return _dead(claim, _text(error).removeprefix(f"{type(error).__name__}: "), log)
    except BaseException as error:  # noqa: BLE001 - sys.exit() in a handler must end neither the thread nor the row
        return _failed(claim, error, log)
    if log.is_enabled_for(logging.INFO):
        own = {"payload": logs.stored(claim.payload), "duration": round(time.monotonic() - started, 6)}
        with suppress(Exception):  # whatever a handler returns, its work is done, and must not be done again
            _tell_of_success(log, fields, own)
    return Outcome(claim.delivery, "done", claim.attempt)


def _tell_of_success(log: logs.Logger, fields: Mapping[str, object] | None, own: dict[str, object]) -> None:
    try:
        further = {name: value for name, value in (fields or {}).items() if name != "event"}
        log.info("processed task", **{**further, **own})
    except Exception as error:  # noqa: BLE001 - fields that no log line can hold
        log.info("processed task", **own, fields_error=_text(error))


def _failed(claim: Claim, error: BaseException, log: logs.Logger) -> Outcome:
    if isinstance(error, TimeLimitReached):
        text = f"the attempt took longer than its {claim.timeout} s"
    else:
        text = _text(error)
    if claim.attempt > claim.max_retries:
        return _dead(claim, text, log)
    delay = retry_delay(claim.attempt)
    log.warning("process task failed", error=text, attempt=claim.attempt, next_try=round(delay, 1))
    return Outcome(claim.delivery, "pending", claim.attempt, delay, text)


def _dead(claim: Claim, text: str, log: logs.Logger) -> Outcome:
    log.error("process task failed", error=text, attempt=claim.attempt, next_try=None)
    return Outcome(claim.delivery, "dead", claim.attempt, error=text)


def _text(error: BaseException) -> str:
    try:
        return one_line(error)
    except BaseException:  # noqa: BLE001 - an error's __str__ is a handler's code too
        return f"{type(error).__name__}, which cannot say more"
