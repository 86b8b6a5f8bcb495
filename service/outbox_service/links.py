"""Endpoints of a verification link: opening it, and the button on its page."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

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

EmailId = Annotated[int, Parameter(ge=1, le=2**63 - 1, description="The id in the link of the mail.")]
SecretCode = Annotated[str, Parameter(min_length=1, max_length=200, description="The secret code in the link.")]


def _wants_json(request: Request[Any, Any, Any]) -> bool:
    accept = request.headers.get("accept", "").lower()
    return "application/json" in accept and "text/html" not in accept


def _with_page(kind: type[Exception], handle: Handler) -> Handler:
    """Returns an exception handler that answers as `handle` does, but with a page unless the client wants JSON."""

    def answer(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
        if _wants_json(request):
            return handle(request, error)
        if kind is ValidationException:
            return _answer(request, LinkState.WRONG, wants_json=False)
        problem = handle(request, error)
        content = problem.content
        response = page(content["title"], _sentence(content["detail"]), status_code=content["status"])
        response.headers.update(problem.headers)
        return response

    return answer


_VERIFY_EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    kind: _with_page(kind, handle) for kind, handle in problems.EXCEPTION_HANDLERS.items() if isinstance(kind, type)
}


class _Answer(NamedTuple):
    """The answer to a link that is used, or cannot be."""

    status_code: int
    title: str
    """The heading of its page."""
    text: str


_ANSWERS = {
    LinkState.VALID: _Answer(200, "Email address verified", "your email address is verified"),
    LinkState.WRONG: _Answer(400, "Link not valid", "this link is not valid: copy the whole link from the mail"),
    LinkState.OUTDATED: _Answer(
        410, "Address changed", "this link is for an address that is no longer the account's, and nothing was changed"
    ),
    LinkState.USED: _Answer(
        410, "Link already used", "this link has already been used: it verified your email address"
    ),
    LinkState.EXPIRED: _Answer(410, "Link expired", "this link has expired, and nothing was changed"),
}

_VERIFY_RESPONSES = {
    200: ResponseSpec(
        EmailVerified,
        description="The address is verified. A browser gets a page.",
        generate_examples=False,
        examples=[Example(summary="verified", value={"is_verified": True})],
    ),
    400: problems.described(400, "The link is not valid.", _ANSWERS[LinkState.WRONG].text),
    410: problems.described(
        410,
        "The link has already been used, has expired, or is for an address that is no longer the account's.",
        _ANSWERS[LinkState.USED].text,
    ),
    503: problems.DESCRIBED_AWAY,
}


@get(
    "/v1/verify_email",
    summary="Open a verification link",
    description=(
        "Verifies the address for a client that accepts application/json and not text/html. "
        "Any other client gets a page with a button, because mail scanners open links too."
    ),
    responses=_VERIFY_RESPONSES,
    exception_handlers=_VERIFY_EXCEPTION_HANDLERS,
)
async def open_verification_link(
    request: Request[Any, Any, Any], store: NamedDependency[Store], email_id: EmailId, secret_code: SecretCode
) -> Response[Any]:
    """Verifies the address for a JSON client; returns a page with a button to any other."""
    wants_json = _wants_json(request)
    link = await store.open_link(email_id, secret_code, use=wants_json)
    if link.state is LinkState.VALID and not wants_json:
        # Another person may have signed up with the reader's address.
        text = f"Click the button to verify {link.email} as the address of the account {link.username}."
        text += " If you did not sign up, close this page: someone else has the password of this account."
        return page("Verify your email address", text, with_button=True)
    return _answer(request, link.state, wants_json=wants_json)


@post(
    "/v1/verify_email",
    status_code=200,
    summary="Verify an address",
    description="The request of the button on the link's page. Takes the query parameters of the link.",
    responses=_VERIFY_RESPONSES,
    exception_handlers=_VERIFY_EXCEPTION_HANDLERS,
)
async def verify_email(
    request: Request[Any, Any, Any], store: NamedDependency[Store], email_id: EmailId, secret_code: SecretCode
) -> Response[Any]:
    """Verifies the address."""
    link = await store.open_link(email_id, secret_code, use=True)
    return _answer(request, link.state, wants_json=_wants_json(request))


def _answer(request: Request[Any, Any, Any], state: LinkState, *, wants_json: bool) -> Response[Any]:
    status_code, title, text = _ANSWERS[state]
    if not wants_json:
        return page(title, _sentence(text), status_code=status_code)
    if state is LinkState.VALID:
        return Response(EmailVerified(is_verified=True), headers=HEADERS)
    return problems.problem(request, status_code, text, headers=HEADERS)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
