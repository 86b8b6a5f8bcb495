"""The `Idempotency-Key` header (draft-ietf-httpapi-idempotency-key-header-07), so that a client can ask again."""

import hashlib
import hmac
import re
from collections.abc import Sequence
from typing import NamedTuple

from litestar.exceptions import ClientException

from outbox.errors import OutboxError

HEADER = "Idempotency-Key"
REPLAYED_HEADER = "Idempotency-Replayed"

_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
"""Matches a string of RFC 9651: printable ASCII, with `"` and the backslash escaped."""
_BARE = re.compile(r"[!#-~][!-~]*")
"""Matches a key without quotes, as clients of other APIs send it."""
_MAX_LENGTH = 255


class KeyReusedError(OutboxError):
    """The key was used for another request."""


class KeyInUseError(OutboxError):
    """Another request with the same key has not ended."""


class IdempotencyKey(NamedTuple):
    """A key, and the fingerprint of the request that came with it."""

    value: str
    fingerprint: bytes


class StoredAnswer(NamedTuple):
    """A row of the statement `find_answer`."""

    fingerprint: bytes
    status_code: int
    body: str


def parse_key(headers: Sequence[str]) -> str:
    """Returns the key in a request's headers of this name, at least one.

    Raises:
        ClientException: there are several, or the value is not a key.
    """
    text = headers[0].strip(" \t")
    if quoted := _QUOTED.fullmatch(text):
        key = re.sub(r"\\(.)", r"\1", quoted[1])
    else:
        key = text if _BARE.fullmatch(text) else ""
    if len(headers) > 1 or not 1 <= len(key) <= _MAX_LENGTH:
        raise ClientException(
            f"{HEADER} must be one string of 1 to {_MAX_LENGTH} printable ASCII characters, quoted or without spaces:"
            " send a new UUID for each request, and the same again to repeat it"
        )
    return key


def fingerprint(secret_key: str, method: str, path: str, body: str) -> bytes:
    """Returns an HMAC-SHA-256 of a request. It is keyed, because a plain hash would let passwords be guessed from it.

    Args:
        secret_key: `SECRET_KEY`.
        method: the HTTP method.
        path: the path.
        body: the parsed body, as text.
    """
    request = f"idempotency\0{method}\0{path}\0{body}"
    return hmac.new(secret_key.encode(), request.encode(), hashlib.sha256).digest()
