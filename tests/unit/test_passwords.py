"""Password hashes."""

import argon2
import pytest

from service.passwords import hash_password


@pytest.mark.parametrize("password", ["correct horse battery", "p" * 1000, "pässwörd \N{LOCK}"])
def test_another_implementation_verifies_the_hash(password: str) -> None:
    """argon2's reference implementation reads it; it is OWASP's first choice of parameters, and no other password's."""
    hashed = hash_password(password)
    assert argon2.extract_parameters(hashed) == argon2.Parameters(argon2.Type.ID, 19, 16, 32, 2, 19_456, 1)
    hasher = argon2.PasswordHasher()
    assert hasher.verify(hashed, password)
    with pytest.raises(argon2.exceptions.VerifyMismatchError):
        hasher.verify(hashed, f"{password}!")


def test_no_two_hashes_are_the_same() -> None:
    """Each has a salt of its own."""
    assert hash_password("correct horse battery") != hash_password("correct horse battery")
