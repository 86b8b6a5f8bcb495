"""Verification links: what opening one does, and what its page's button does."""

from collections.abc import Callable
from typing import Annotated, Any

from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.exceptions import ValidationException
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import Parameter
from litestar.types import ExceptionHandlersMap

from outbox_service import problems
from outbox_service.pages import HEADERS, page
from outbox_service.schemas import EmailVerified
from outbox_service.store import LinkState, Store

Handler = Callable[[Request[Any, Any, Any], Any], Response[Any]]

EmailId = Annotated[int, Parameter(ge=1, le=2**63 - 1, description="Which verification: from the link in the mail.")]
SecretCode = Annotated[str, Parameter(min_length=1, max_length=200, description="The link's secret code.")]


def _wants_json(request: Request[Any, Any, Any]) -> bool:
    accept = request.headers.get("accept", "").lower()
    return "application/json" in accept and "text/html" not in accept


def _readable(kind: type[Exception], handle: Handler) -> Handler:
    """Returns an exception handler that answers as `handle` does, but with a page where a person reads it."""

    def answer(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
        if _wants_json(request):
            return handle(request, error)
        if kind is ValidationException:
            return _answer(request, LinkState.WRONG, wants_json=False)
        told = handle(request, error)
        shown = page(told.content["title"], _sentence(told.content["detail"]), status_code=told.content["status"])
        shown.headers.update(told.headers)
        return shown

    return answer


_VERIFY_EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    kind: _readable(kind, handle) for kind, handle in problems.EXCEPTION_HANDLERS.items() if isinstance(kind, type)
}

_VERIFY_RESPONSES = {
    200: ResponseSpec(
        EmailVerified,
        description="The address is verified. A browser gets a page.",
        generate_examples=False,
        examples=[Example(summary="verified", value={"is_verified": True})],
    ),
    400: problems.described(400, "The link is not valid.", "this link is not valid: copy it from the mail as a whole"),
    410: problems.described(
        410,
        "The link was used already, has expired, or is for an address that is no longer the user's.",
        "this link was used already",
    ),
    503: problems.DESCRIBED_AWAY,
}


@get(
    "/v1/verify_email",
    summary="Open a verification link",
    description=(
        "A client that accepts application/json and not text/html verifies the address by this. "
        "Everybody else gets a page with a button, because mail scanners open links too."
    ),
    responses=_VERIFY_RESPONSES,
    exception_handlers=_VERIFY_EXCEPTION_HANDLERS,
)
async def open_verification_link(
    request: Request[Any, Any, Any], store: NamedDependency[Store], email_id: EmailId, secret_code: SecretCode
) -> Response[Any]:
    """Verifies the address for a JSON client; shows a person the button."""
    wants_json = _wants_json(request)
    found, username, email = await store.open_link(email_id, secret_code, use=wants_json)
    if found is LinkState.VALID and not wants_json:
        # Another person may have signed up with the reader's address.
        text = f"One click, and the account {username} gets the confirmed address {email}."
        text += " If you did not sign up, close this page: somebody else has the account's password."
        return page("Verify your email address", text, with_button=True)
    return _answer(request, found, wants_json=wants_json)


@post(
    "/v1/verify_email",
    status_code=200,
    summary="Verify an address",
    description="What the button on the link's page does. Takes the link's query parameters.",
    responses=_VERIFY_RESPONSES,
    exception_handlers=_VERIFY_EXCEPTION_HANDLERS,
)
async def verify_email(
    request: Request[Any, Any, Any], store: NamedDependency[Store], email_id: EmailId, secret_code: SecretCode
) -> Response[Any]:
    """Verifies the address."""
    found, _, _ = await store.open_link(email_id, secret_code, use=True)
    return _answer(request, found, wants_json=_wants_json(request))


def _answer(request: Request[Any, Any, Any], found: LinkState, *, wants_json: bool) -> Response[Any]:
    status, title, text = {
        LinkState.VALID: (200, "Verified", "thank you: your email address is verified"),
        LinkState.WRONG: (400, "Not a valid link", "this link is not valid: copy it from the mail as a whole"),
        LinkState.OUTDATED: (
            410,
            "Not this address any more",
            "this link is for another address than the account has now, and nothing was changed",
        ),
        LinkState.USED: (410, "Used already", "this link was used already"),
        LinkState.EXPIRED: (410, "Expired", "this link has expired, and nothing was changed"),
    }[found]
    if not wants_json:
        return page(title, _sentence(text), status_code=status)
    if found is LinkState.VALID:
        return Response(EmailVerified(is_verified=True), headers=HEADERS)
    return problems.problem(request, status, text, headers=HEADERS)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
