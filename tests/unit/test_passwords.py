"""Password hashes."""

import asyncio
import threading

import argon2
import pytest

from outbox_service import passwords
from outbox_service.passwords import BusyError, PasswordHasher, hash_password
from tests.support.waiting import eventually


@pytest.mark.parametrize("password", ["correct horse battery", "p" * 1000, "pässwörd \N{LOCK}"])
def test_another_implementation_verifies_the_hash(password: str) -> None:
    """argon2's reference implementation accepts it for this password only, with OWASP's first choice of parameters."""
    hashed = hash_password(password)
    assert argon2.extract_parameters(hashed) == argon2.Parameters(argon2.Type.ID, 19, 16, 32, 2, 19_456, 1)
    hasher = argon2.PasswordHasher()
    assert hasher.verify(hashed, password)
    with pytest.raises(argon2.exceptions.VerifyMismatchError):
        hasher.verify(hashed, f"{password}!")


def test_no_two_hashes_are_the_same() -> None:
    """Each hash has a new salt."""
    assert hash_password("correct horse battery") != hash_password("correct horse battery")


def test_a_hash_outlives_its_request_and_the_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disconnect frees no thread; a hash that is computed while the service stops ends without a traceback."""
    started, release = threading.Semaphore(0), threading.Event()

    def wait(password: str) -> str:
        started.release()
        release.wait(10)
        return password

    monkeypatch.setattr(passwords, "hash_password", wait)
    hashing = PasswordHasher(queue=0)

    async def disconnect() -> None:
        requests = [asyncio.create_task(hashing.hash("x")) for _ in range(passwords.usable_cores())]
        await asyncio.sleep(0)
        assert all(started.acquire(timeout=10) for _ in requests)
        for request in requests:
            request.cancel()
        await asyncio.wait(requests)
        with pytest.raises(BusyError):
            await hashing.hash("one more")

    asyncio.run(disconnect())
    release.set()
    eventually(lambda: asyncio.run(_is_free(hashing)), 10, "the threads are free")
    hashing.close()
    assert not caplog.records


async def _is_free(hashing: PasswordHasher) -> bool:
    try:
        return await hashing.hash("x") == "x"
    except BusyError:
        return False
