"""Fixtures that several unit tests use."""

import os

import pytest

from tests.support.settings import REQUIRED


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Sets the required variables and none of the other settings."""
    for name in list(os.environ):
        if name.startswith(("OUTBOX_", "LOG_", "HTTP_SERVER", "VERIFY_")) or name in REQUIRED:
            monkeypatch.delenv(name)
    for name, value in REQUIRED.items():
        monkeypatch.setenv(name, value)
    return monkeypatch
