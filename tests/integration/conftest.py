"""Fixtures of several integration tests."""

import pytest

from tests.support import mailbox


@pytest.fixture(params=[True, False], ids=["pipelined", "one by one"])
def pipelining(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with mail servers that support pipelining and with servers that do not."""
    monkeypatch.setattr(mailbox, "PIPELINING", request.param)
