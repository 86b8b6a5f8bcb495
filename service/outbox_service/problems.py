"""Maps errors to `application/problem+json` answers (RFC 9457)."""

from http import HTTPStatus
from typing import Any

import psycopg
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.types import ExceptionHandlersMap

from outbox.errors import NotMigratedError, OutboxError, UnsupportedDatabaseError
from outbox.runtime import logs, postgres
from outbox.runtime.redaction import one_line
from outbox_service.idempotency import KeyInUseError, KeyReusedError
from outbox_service.passwords import BusyError
from outbox_service.schemas import MAX_BODY, CreateUser, Problem, Violation
from outbox_service.store import TakenError

MEDIA_TYPE = "application/problem+json"

RETRY_AFTER = "1"
"""The `Retry-After` header of answers that ask for a later try, in seconds."""

INVALID_FIELDS = "the request has invalid fields: 'errors' lists each"

TOO_LARGE = f"the body must not be over {MAX_BODY // 1024} KiB"

_MAX_NAME = 100
"""Maximum characters of a field's name in an answer."""

AnyRequest = Request[Any, Any, Any]


def problem(
    request: AnyRequest,
    status: int,
    detail: str,
    errors: list[Violation] | None = None,
    headers: dict[str, str] | None = None,
) -> Response[dict[str, Any]]:
    """Returns the answer for an error.

    Args:
        request: the request that failed.
        status: the HTTP status.
        detail: one sentence: the error and its remedy.
        errors: the violations, by field.
        headers: additional headers.
    """
    content = problem_content(status, detail, request.scope["state"].get("request_id", ""), errors)
    return Response(content, status_code=status, media_type=MEDIA_TYPE, headers=headers or {})


def problem_content(status: int, detail: str, request_id: str, errors: list[Violation] | None = None) -> dict[str, Any]:
    """Returns the body of the answer for an error; the arguments are those of `problem`."""
    title = HTTPStatus(status).phrase
    content = Problem(title=title, status=status, detail=detail, request_id=request_id, errors=errors)
    return content.model_dump(exclude_none=True)


def _invalid(request: AnyRequest, error: ValidationException) -> Response[dict[str, Any]]:
    if not isinstance(error.extra, list):
        # The rest of Litestar's text is the whole URL, with the secret code.
        return problem(request, 400, error.detail.partition(" for path ")[0])
    violations = [
        _violation(str(violation.get("key") or "body"), str(violation.get("message", "")))
        for violation in error.extra
        if isinstance(violation, dict)
    ]
    return problem(request, 400, INVALID_FIELDS, violations)


def _violation(field: str, text: str) -> Violation:
    described = CreateUser.model_fields[field].description if field in CreateUser.model_fields else None
    if text.startswith("String should match pattern") and described:
        text = f"must be {described[0].lower()}{described[1:]}".removesuffix(".")
    elif text.startswith("Input should be a valid dictionary"):
        text = "must be a JSON object"
    text = text.removeprefix("Value error, ")
    return Violation(field=field[:_MAX_NAME], message=text[:1].lower() + text[1:])


def _http(request: AnyRequest, error: HTTPException) -> Response[dict[str, Any]]:
    # The text of the framework's own 5xx may reveal internals.
    detail = error.detail if error.status_code < 500 else "internal error"
    if error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        detail = TOO_LARGE
    return problem(request, error.status_code, detail, headers=error.headers)


def _taken(request: AnyRequest, error: TakenError) -> Response[dict[str, Any]]:
    return problem(request, 409, str(error), [Violation(field=error.field, message="is taken")])


def _retry_later(request: AnyRequest, detail: str, status: int = 503) -> Response[dict[str, Any]]:
    return problem(request, status, detail, headers={"Retry-After": RETRY_AFTER})


def _key_in_use(request: AnyRequest, error: KeyInUseError) -> Response[dict[str, Any]]:
    return _retry_later(request, str(error), 409)


def _key_reused(request: AnyRequest, error: KeyReusedError) -> Response[dict[str, Any]]:
    return problem(request, 422, str(error))


def _not_ready(request: AnyRequest, error: OutboxError) -> Response[dict[str, Any]]:
    return _retry_later(request, str(error))


def _away(request: AnyRequest, error: Exception) -> Response[dict[str, Any]]:
    state = "unavailable" if postgres.is_outage(error) else "busy"
    return _retry_later(request, f"the database is {state}: try again in a moment")


def _read_only(request: AnyRequest, _: Exception) -> Response[dict[str, Any]]:
    return _retry_later(request, "the database is read-only: try again in a moment")


def _never_migrated(request: AnyRequest, _: psycopg.errors.UndefinedTable) -> Response[dict[str, Any]]:
    return _retry_later(request, "the database is not migrated: run 'outbox migrate'")


def _failed(request: AnyRequest, error: Exception) -> Response[dict[str, Any]]:
    logs.get().error("request failed", error=one_line(error), exc_info=error)
    return problem(request, 500, "internal error: the service's log has the details under this request id")


EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    ValidationException: _invalid,
    HTTPException: _http,
    TakenError: _taken,
    KeyInUseError: _key_in_use,
    KeyReusedError: _key_reused,
    BusyError: _not_ready,
    NotMigratedError: _not_ready,
    UnsupportedDatabaseError: _not_ready,
    psycopg.errors.UndefinedTable: _never_migrated,
    **dict.fromkeys(postgres.AWAY, _away),
    psycopg.errors.ReadOnlySqlTransaction: _read_only,
    Exception: _failed,
}


def described(status: int, description: str, detail: str, errors: list[Violation] | None = None) -> ResponseSpec:
    """Returns the OpenAPI description of an error answer, with an example."""
    example = problem_content(status, detail, "5f0c2c8e6d4b", errors)
    return ResponseSpec(
        Problem,
        description=description,
        media_type=MEDIA_TYPE,
        generate_examples=False,
        examples=[Example(summary=description, value=example)],
    )


DESCRIBED_AWAY = described(
    503,
    "The service is too busy, or the database is unavailable.",
    "the database is unavailable: try again in a moment",
)
