"""Derives the secret code in a verification link, which is stored nowhere."""

import hashlib
import hmac


def secret_code(secret_key: str, email_id: int, username: str, email: str) -> str:
    """Returns the code of a verification: the HMAC-SHA-256 of its id, user and address, in 64 hex digits.

    The same row gives the same code, so a mail that is sent twice carries the same link. The database holds no code, so
    a leak of it opens no link.

    Args:
        secret_key: `SECRET_KEY`.
        email_id: the id of the row in `verify_emails`.
        username: the user.
        email: the user's address.
    """
    message = "\0".join(("verify_email", str(email_id), username, email))
    return hmac.new(secret_key.encode(), message.encode(), hashlib.sha256).hexdigest()


def is_secret_code(code: str, secret_key: str, email_id: int, username: str, email: str) -> bool:
    """Returns whether `code` is the verification's code, in constant time."""
    expected = secret_code(secret_key, email_id, username, email)
    return hmac.compare_digest(code.encode(errors="replace"), expected.encode())
