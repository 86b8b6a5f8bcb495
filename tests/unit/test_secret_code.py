"""The secret code in a verification link."""

import re
from itertools import combinations

from outbox.signup.secret_code import is_secret_code, secret_code

KEY = "a secret key for tests, 32 characters or more"
CODE = secret_code(KEY, 1, "alice", "alice@example.com")


def test_the_code_is_the_same_at_every_attempt() -> None:
    """A mail that is sent twice has the same link. The code must not change with a release: open links need it."""
    assert secret_code(KEY, 1, "alice", "alice@example.com") == CODE
    assert CODE == "e3643f1fe8047fc8348251189cbe54da312738348fce5d590dfb38818eee35db"
    assert re.fullmatch("[0-9a-f]{64}", CODE)


def test_another_row_user_address_or_key_has_another_code() -> None:
    """A code is valid only for its own verification, even if the joined parts are the same text."""
    codes = [
        CODE,
        secret_code(KEY + "!", 1, "alice", "alice@example.com"),
        secret_code(KEY, 2, "alice", "alice@example.com"),
        secret_code(KEY, 1, "alicf", "alice@example.com"),
        secret_code(KEY, 1, "alice", "Alice@example.com"),
        secret_code(KEY, 1, "alicea", "lice@example.com"),
        secret_code(KEY, 11, "alice", "alice@example.com"),
        secret_code(KEY, 1, "1alice", "alice@example.com"),
    ]
    assert all(one != other for one, other in combinations(codes, 2))


def test_only_the_exact_code_is_accepted() -> None:
    """Any other text is rejected without an error."""
    assert is_secret_code(CODE, KEY, 1, "alice", "alice@example.com")
    for wrong in ("", CODE[:-1], CODE + "0", CODE.upper(), f" {CODE}", CODE[::-1], "\0", "ü", "\ud800", "😀" * 64):
        assert not is_secret_code(wrong, KEY, 1, "alice", "alice@example.com"), wrong
    assert not is_secret_code(CODE, KEY, 2, "alice", "alice@example.com")
