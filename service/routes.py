"""The endpoints."""

from typing import Annotated, Any

from litestar import MediaType, Request, Response, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import Parameter

from service import problems
from service.pages import HEADERS, page
from service.passwords import Passwords
from service.schemas import CreateUser, EmailVerified, Health, UserCreated, Violation
from service.store import Store, Verification

EmailId = Annotated[int, Parameter(ge=1, le=2**63 - 1, description="Which verification: from the link in the mail.")]
SecretCode = Annotated[str, Parameter(min_length=1, max_length=200, description="The link's secret code.")]

_ALICE = {
    "username": "alice",
    "full_name": "Alice Liddell",
    "email": "alice@example.com",
    "is_email_verified": False,
    "password_changed_at": "2026-11-22T10:00:00Z",
    "created_at": "2026-11-22T10:00:00Z",
}

_AWAY = problems.described(
    503, "Too busy, or the database is away.", "the database is away: try again in a moment"
)


@post(
    ["/v1/users", "/v1/create_user"],
    summary="Create a user",
    description="Creates a user, who gets a verification mail whatever happens after this answer.",
    responses={
        201: ResponseSpec(
            UserCreated,
            description="The user exists, and the mail is on its way.",
            generate_examples=False,
            examples=[Example(summary="created", value={"user": _ALICE})],
        ),
        400: problems.described(
            400,
            "Not JSON, or fields that are not valid; each is named.",
            "the request has fields that are not valid; 'errors' names each",
            [Violation(field="username", message="string should have at least 3 characters")],
        ),
        409: problems.described(
            409,
            "The username or email is taken.",
            "this username is taken",
            [Violation(field="username", message="is taken")],
        ),
        413: problems.described(413, "The body is over 64 KiB.", "Request Entity Too Large"),
        503: _AWAY,
    },
)
async def create_user(
    request: Request[Any, Any, Any], data: CreateUser, store: Store, passwords: Passwords
) -> UserCreated:
    """Creates a user."""
    hashed = await passwords.hash(data.password)
    return UserCreated(user=await store.create_user(data, hashed, request.state["request_id"]))


_VERIFY_RESPONSES = {
    200: ResponseSpec(
        EmailVerified,
        description="The address is verified. A browser gets a page.",
        generate_examples=False,
        examples=[Example(summary="verified", value={"is_verified": True})],
    ),
    400: problems.described(400, "The link is not valid.", "this link is not valid: copy it from the mail as a whole"),
    410: problems.described(
        410, "The link was used already, or has expired.", "this link was used already: the address is verified"
    ),
    503: _AWAY,
}


@get(
    "/v1/verify_email",
    summary="Open a verification link",
    description=(
        "A client that accepts application/json and not text/html verifies the address by this. "
        "Everybody else gets a page with a button, because mail scanners open links too."
    ),
    responses=_VERIFY_RESPONSES,
)
async def open_verification_link(
    request: Request[Any, Any, Any], store: Store, email_id: EmailId, secret_code: SecretCode
) -> Response[Any]:
    """Verifies the address for a JSON client; shows a person the button."""
    wants_json = _wants_json(request)
    found = await store.verify(email_id, secret_code, use=wants_json)
    if found is Verification.VALID and not wants_json:
        return page("Verify your email address", "One click, and your address is verified.", with_button=True)
    return _answer(request, found, wants_json)


@post(
    "/v1/verify_email",
    status_code=200,
    summary="Verify an address",
    description="What the button on the link's page does. Takes the link's query parameters.",
    responses=_VERIFY_RESPONSES,
)
async def verify_email(
    request: Request[Any, Any, Any], store: Store, email_id: EmailId, secret_code: SecretCode
) -> Response[Any]:
    """Verifies the address."""
    return _answer(request, await store.verify(email_id, secret_code, use=True), _wants_json(request))


def _wants_json(request: Request[Any, Any, Any]) -> bool:
    accept = request.headers.get("accept", "").lower()
    return "application/json" in accept and "text/html" not in accept


def _answer(request: Request[Any, Any, Any], found: Verification, wants_json: bool) -> Response[Any]:
    status, title, text = {
        Verification.VALID: (200, "Verified", "thank you: your email address is verified"),
        Verification.WRONG: (400, "Not a valid link", "this link is not valid: copy it from the mail as a whole"),
        Verification.USED: (410, "Used already", "this link was used already: the address is verified"),
        Verification.EXPIRED: (410, "Expired", "this link has expired, and nothing was changed"),
    }[found]
    if not wants_json:
        return page(title, f"{text[:1].upper()}{text[1:]}.", status_code=status)
    if found is Verification.VALID:
        return Response(EmailVerified(is_verified=True), headers=HEADERS)
    return problems.problem(request, status, text, headers=HEADERS)


@get(
    "/healthz",
    summary="Is the process alive?",
    responses={
        200: ResponseSpec(
            Health, description="It is.", generate_examples=False, examples=[Example(value={"status": "ok"})]
        )
    },
)
async def healthz() -> Health:
    """Answers while the process lives, whatever the database does."""
    return Health(status="ok")


@get(
    "/readyz",
    summary="Can it serve?",
    description="Whether Postgres answers and is migrated. Redis does not matter here.",
    media_type=MediaType.JSON,
    responses={
        200: ResponseSpec(
            Health, description="It can.", generate_examples=False, examples=[Example(value={"status": "ready"})]
        ),
        503: _AWAY,
    },
)
async def readyz(store: Store) -> Health:
    """Answers 200 when Postgres does, and 503 until then."""
    await store.check_ready()
    return Health(status="ready")
