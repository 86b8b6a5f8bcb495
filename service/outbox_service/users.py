"""The endpoint that creates users."""

import hmac
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from litestar import MediaType, Request, Response, post
from litestar.di import NamedDependency
from litestar.exceptions import ClientException, SerializationException
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import HeaderParameter, JSONBody

from outbox_service import idempotency, problems
from outbox_service.idempotency import IdempotencyKey, KeyInUseError, KeyReusedError, StoredAnswer
from outbox_service.passwords import PasswordHasher
from outbox_service.schemas import MAX_FIELDS, CreateUser, User, UserCreated, Violation
from outbox_service.store import Store

_JSON = re.compile(r"application/json|[\w!#$&^.+-]+/[\w!#$&^.+-]+\+json", re.ASCII)
"""Matches media types of JSON (RFC 6838 defines the characters of a name, RFC 6839 the suffix)."""

_NOT_JSON = "the body must be JSON: send it with Content-Type: application/json"

KEY_REUSED = "this Idempotency-Key was used for another request: send a new key for each request"

_ALICE = {
    "username": "alice",
    "full_name": "Alice Liddell",
    "email": "alice@example.com",
    "is_email_verified": False,
    "password_changed_at": "2026-11-22T10:00:00Z",
    "created_at": "2026-11-22T10:00:00Z",
}


Key = Annotated[
    str | None,
    HeaderParameter(
        name=idempotency.HEADER,
        description=(
            "A string of 1 to 255 printable ASCII characters, quoted or bare; a UUID is best. A repetition of the"
            " request with the same key gets the same answer with `Idempotency-Replayed: true`, and changes nothing."
            " Answers are kept for a day, or as long as OUTBOX_IDEMPOTENCY_RETENTION says. An error is not kept: the"
            " same key may be used for the corrected request."
        ),
        schema_extra={"examples": ['"8e03978e-40d5-43dd-bc93-6894a57f9324"']},
    ),
]


@dataclass(frozen=True)
class SignUp:
    """Creates users. One dependency and not two, because Litestar starts a task for each if there are several."""

    hasher: PasswordHasher
    store: Store
    secret_key: str = field(repr=False)

    async def create(self, user: CreateUser, request_id: str) -> User:
        """Hashes the password and writes the user.

        Raises:
            BusyError: too many requests wait for a hash.
            TakenError, RefusedError, psycopg.OperationalError: as `Store.create_user` does.
        """
        hashed = await self.hasher.hash(user.password)
        return await self.store.create_user(user, hashed, request_id)

    async def create_once(self, user: CreateUser, request_id: str, key: IdempotencyKey) -> tuple[StoredAnswer, bool]:
        """Creates a user unless the key has an answer; returns the answer, and whether it is an earlier one's.

        Raises:
            KeyReusedError: the key was used for another request.
            KeyInUseError: another request with the key has not ended.
            BusyError, TakenError, RefusedError, psycopg.OperationalError: as `create` does.
        """
        if (stored := await self.store.find_answer(key)) is None:
            hashed = await self.hasher.hash(user.password)
            if answer := await self.store.create_user_once(user, hashed, request_id, key):
                return answer, False
            stored = await self.store.find_answer(key)
        if stored is None:  # its retention ended just now
            raise KeyInUseError("this Idempotency-Key has just expired: try again")
        if not hmac.compare_digest(stored.fingerprint, key.fingerprint):
            raise KeyReusedError(KEY_REUSED)
        return stored, True


async def _check_body(request: Request[Any, Any, Any]) -> None:
    """Refuses a body that is not JSON, before the framework reads it.

    Raises:
        ClientException: the body is not declared as JSON (415), or is not readable JSON (400). The framework alone
            would answer 500 to text that is not UTF-8 and to a thousand nested arrays.
    """
    # Without a preflight, a browser sends no JSON media type across origins: only others, or none.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not _JSON.fullmatch(media_type):
        raise ClientException(_NOT_JSON, status_code=415)
    if not await request.body():
        raise ClientException("the body is empty: send a JSON object")
    try:
        body = await request.json()
    except SerializationException as error:
        raise ClientException(f"the body is not JSON: {error}") from None
    except UnicodeDecodeError:
        raise ClientException("the body is not valid UTF-8") from None
    except RecursionError:
        raise ClientException("the body is nested too deeply") from None
    if isinstance(body, dict) and len(body) > MAX_FIELDS:  # each would cost a violation and lengthen the answer
        raise ClientException(f"the body has {len(body)} fields: send only {', '.join(CreateUser.model_fields)}")


@post(
    ["/v1/users", "/v1/create_user"],
    before_request=_check_body,
    summary="Create a user",
    description="Creates a user. The user gets a verification mail, whatever fails after this answer.",
    responses={
        201: ResponseSpec(
            UserCreated,
            description="The user exists, and the verification mail will be sent.",
            generate_examples=False,
            examples=[Example(summary="created", value={"user": _ALICE})],
        ),
        400: problems.described(
            400,
            "The body is not JSON, or has invalid fields; each is listed.",
            problems.INVALID_FIELDS,
            [Violation(field="username", message="string should have at least 3 characters")],
        ),
        409: problems.described(
            409,
            "The username or email is taken, or another request with the same Idempotency-Key has not ended.",
            "this username is taken",
            [Violation(field="username", message="is taken")],
        ),
        413: problems.described(413, "The body is over 64 KiB.", problems.TOO_LARGE),
        415: problems.described(415, "The Content-Type is not JSON.", _NOT_JSON),
        422: problems.described(422, "The Idempotency-Key was used for another request.", KEY_REUSED),
        503: problems.DESCRIBED_AWAY,
    },
)
async def create_user(
    request: Request[Any, Any, Any],
    data: JSONBody[CreateUser],
    sign_up: NamedDependency[SignUp],
    idempotency_key: Key = None,
) -> UserCreated | Response[bytes]:
    """Creates a user."""
    request_id = request.state["request_id"]
    if idempotency_key is None:
        return UserCreated(user=await sign_up.create(data, request_id))
    key = IdempotencyKey(
        idempotency.parse_key(request.headers.getall(idempotency.HEADER)),
        idempotency.fingerprint(sign_up.secret_key, request.method, request.url.path, data.model_dump_json()),
    )
    answer, is_replayed = await sign_up.create_once(data, request_id, key)
    headers = {idempotency.REPLAYED_HEADER: "true"} if is_replayed else {}
    return Response(answer.body.encode(), status_code=answer.status_code, media_type=MediaType.JSON, headers=headers)
