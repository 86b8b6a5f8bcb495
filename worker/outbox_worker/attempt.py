"""Runs one attempt at a row and decides its outcome."""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from inspect import isasyncgen, isawaitable, iscoroutine, isgenerator
from typing import Any, cast

from pydantic import BaseModel

from outbox.backoff import LONGEST_UNHANDLED_DELAY, retry_delay, unhandled_delay
from outbox.context import Context
from outbox.errors import HandlerError, NotNowError, OutboxError, PayloadError, SkipRetry, TimeLimitError
from outbox.handler import Handler
from outbox.row import Status
from outbox.runtime import logs
from outbox.runtime.postgres import is_outage
from outbox.runtime.redaction import one_line
from outbox.runtime.tally import Tally
from outbox_worker import deadline
from outbox_worker.claim import Claim
from outbox_worker.outcome import Attempted, Outcome
from outbox_worker.pace import Pace
from outbox_worker.registry import Registry

_unhandled = Tally()
"""Counts rows that this worker has given back because it cannot handle them, by task and reason."""
_unhandled_pace = Pace(200, LONGEST_UNHANDLED_DELAY)
"""Spreads their next attempts, 200 a second: ten thousand rows of a new task must not keep all others waiting."""

NOT_NOW_DELAY = 1.0
"""Seconds until the next attempt at a row if this one does not count because a server is away."""


class _NotHandledError(OutboxError):
    """This worker cannot handle the row; another worker may."""

    def __init__(self, event: str, why: str) -> None:
        super().__init__(why)
        self.event = event


def attempt(claim: Claim, registry: Registry, context: Context, unhandled_grace: float) -> Attempted:
    """Runs the row's handler and returns the outcome. Catches every error that the handler raises.

    Args:
        claim: the row.
        registry: the handlers of this worker.
        context: passed to the handler.
        unhandled_grace: seconds for which a row that this worker cannot handle is given back; then it is dead.
    """
    # In a context of its own: context variables that a handler sets, for the log or otherwise, must not reach another
    # row.
    own = copy_context()
    outcome, report = own.run(_attempt, claim, registry, context, unhandled_grace)
    return Attempted(outcome, report and partial(own.run, report))


def _attempt(claim: Claim, registry: Registry, context: Context, unhandled_grace: float) -> Attempted:
    logs.bind_fields(
        type=claim.task, row=claim.delivery.row_id, delivery=claim.delivery.number, request_id=claim.request_id
    )
    deadline.limit(context.deadline)
    started = time.monotonic()
    try:
        fields = _call(claim, registry, context)
    except _NotHandledError as error:
        return _not_handled(claim, error, unhandled_grace)
    except SkipRetry as error:
        # A payload or a mail server may have made the text long, or put characters into it that Postgres cannot store.
        return _dead(claim, _sentence(error), error)
    except NotNowError as error:
        # Not logged: the outage is logged once, not once per row.
        return Attempted(Outcome(claim.delivery, Status.PENDING, claim.attempt - 1, NOT_NOW_DELAY, _text(error)), None)
    except BaseException as error:  # noqa: BLE001 - sys.exit() in a handler must end neither the thread nor the row
        return _failed(claim, error)
    outcome = Outcome(claim.delivery, Status.DONE, claim.attempt)
    if not logs.get().is_enabled_for(logging.INFO):
        return Attempted(outcome, None)
    return Attempted(outcome, partial(_report_done, claim, fields, round(time.monotonic() - started, 6)))


def _call(claim: Claim, registry: Registry, context: Context) -> Mapping[str, object] | None:
    handler, payload = _handler_and_payload(claim, registry)
    result: object = handler.function(payload, context)
    if isinstance(result, dict | None):  # nearly always; the checks below are slow
        return result
    if isawaitable(result) or isgenerator(result) or isasyncgen(result) or isinstance(result, Future):
        if iscoroutine(result) or isgenerator(result):
            result.close()
        raise HandlerError(
            f"the handler of {claim.task} returned a {type(result).__name__}, which the worker does not run:"
            " it must be a plain function that returns when its work is done"
        )
    return cast("Mapping[str, object] | None", result)


def _handler_and_payload(claim: Claim, registry: Registry) -> tuple[Handler[Any], BaseModel]:
    handler = registry.get(claim.task)
    if handler is None:
        why = (
            f"no handler for task {claim.task!r}: the worker was older than the row, or OUTBOX_HANDLERS lacks a module"
        )
        raise _NotHandledError("task is unknown to this worker", why)
    try:
        return handler, handler.task.parse(claim.payload)
    except PayloadError as error:
        raise _NotHandledError("payload does not fit its model", str(error)) from None


def _not_handled(claim: Claim, error: _NotHandledError, grace: float) -> Attempted:
    """Gives back a row that a newer or older worker may handle; after `grace` seconds of that, the row is dead.

    The attempt does not count: during a deploy this may happen many times before the right worker takes the row.
    """
    claim = claim._replace(attempt=claim.attempt - 1)
    text = _sentence(error)
    unhandled_for = claim.unhandled_for or 0.0
    if unhandled_for >= grace:
        return _dead(claim, text, error)
    delay = unhandled_delay(unhandled_for, _unhandled_pace.next_delay())
    outcome = Outcome(claim.delivery, Status.PENDING, claim.attempt, delay, text, unhandled=True)
    if not (times := _unhandled.count(claim.task, text)):
        return Attempted(outcome, None)
    return Attempted(outcome, partial(logs.get().error, error.event, error=text, times=times, next_try=round(delay, 1)))


def _report_done(claim: Claim, fields: Mapping[str, object] | None, duration: float) -> None:
    log = logs.get()
    own = {"payload": logs.payload_field(claim.payload), "duration": duration}
    try:
        further = {name: value for name, value in (fields or {}).items() if name != "event"}
        log.info("processed task", **{**further, **own})
    except Exception as error:  # noqa: BLE001 - the handler's fields cannot be logged
        log.info("processed task", **own, fields_error=_text(error))


def _failed(claim: Claim, error: BaseException) -> Attempted:
    is_late = isinstance(error, TimeLimitError)
    text = f"the attempt took longer than its {claim.timeout} s" if is_late else _text(error)
    if claim.attempt > claim.max_retries:
        return _dead(claim, text, error)
    delay = retry_delay(claim.attempt)
    report = partial(
        logs.get().warning,
        "process task failed",
        error=text,
        attempt=claim.attempt,
        next_try=round(delay, 1),
        **_traced(error),
    )
    return Attempted(Outcome(claim.delivery, Status.PENDING, claim.attempt, delay, text), report)


def _dead(claim: Claim, text: str, error: BaseException) -> Attempted:
    report = partial(
        logs.get().error,
        "process task failed",
        error=text,
        attempt=claim.attempt,
        next_try=None,
        **_traced(error),
    )
    return Attempted(Outcome(claim.delivery, Status.DEAD, claim.attempt, error=text), report)


def _traced(error: BaseException) -> dict[str, Any]:
    """Returns the log field for the traceback; none for this project's errors and outages of Postgres."""
    return {} if isinstance(error, OutboxError) or is_outage(error) else {"exc_info": error}


def _sentence(error: OutboxError) -> str:
    return _text(error).removeprefix(f"{type(error).__name__}: ")


def _text(error: BaseException) -> str:
    try:
        return one_line(error)
    except BaseException:  # noqa: BLE001 - an error's __str__ is a handler's code too
        return f"{type(error).__name__}, which cannot say more"
