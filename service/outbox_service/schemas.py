"""The API's request and response bodies."""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, EmailStr, Field, StringConstraints

from outbox_service.email_addresses import MAX_ADDRESS, canonicalize
from outbox_service.unicode_rules import MAX_MARKS, check_visible

MAX_BODY = 64 * 1024
"""Maximum bytes of a request's body."""

MAX_FIELDS = 20
"""Maximum fields of a body: more than any valid body has, and few enough for an answer to name each invalid one."""


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain NUL characters")
    return text


class CreateUser(BaseModel):
    """A new user."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    username: Annotated[
        str,
        StringConstraints(min_length=3, max_length=100, pattern="^[a-z0-9_]*$"),
        Field(
            description="Lower-case letters, digits and '_' only.",
            examples=["alice"],
        ),
    ]
    password: Annotated[str, Field(min_length=6, max_length=100, examples=["correct horse"]), AfterValidator(_storable)]
    full_name: Annotated[
        str,
        StringConstraints(min_length=3, max_length=100, pattern=rf"^ *(?:\p{{L}}\p{{M}}{{0,{MAX_MARKS}}} *)+$"),
        Field(
            description=f"Letters of any script, each with at most {MAX_MARKS} combining marks, and spaces only.",
            examples=["Alice Liddell"],
        ),
        AfterValidator(check_visible),
    ]
    email: Annotated[
        EmailStr,
        BeforeValidator(canonicalize),
        Field(
            min_length=3,
            max_length=MAX_ADDRESS,
            description=(
                "An address without a display name. Non-ASCII characters before the @ must be letters, marks or digits;"
                " with any of them, that part is stored in lower case."
            ),
            examples=["alice@example.com"],
        ),
    ]


def _in_utc(time: datetime) -> datetime:
    return time.astimezone(UTC)


class User(BaseModel):
    """A user as the API returns it, without the password's hash."""

    username: str
    full_name: str
    email: str
    is_email_verified: bool
    password_changed_at: Annotated[datetime, AfterValidator(_in_utc)]
    created_at: Annotated[datetime, AfterValidator(_in_utc)]


class UserCreated(BaseModel):
    """The answer to a created user."""

    user: User


class EmailVerified(BaseModel):
    """The answer to a verification link."""

    is_verified: bool


class Health(BaseModel):
    """The answer to a probe."""

    status: str


class Violation(BaseModel):
    """One error in one field."""

    field: str
    message: str


class Problem(BaseModel):
    """An error in the format of RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[Violation] | None = None
