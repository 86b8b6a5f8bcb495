"""An environment for tests of settings, and what a refused value must look like."""

import pytest

from outbox.errors import SettingsError
from outbox.runtime import redis_connection
from outbox.runtime.settings import DatabaseSettings, RelaySettings, ServiceSettings, WorkerSettings

SECRET = "hunter2"
"""Stands for a password. No sentence may show it."""
REQUIRED = {
    "DATABASE_URL": f"postgresql://outbox:{SECRET}@db:5432/outbox",
    "REDIS_URL": f"redis://:{SECRET}@redis:6379/0",
    "SMTP_URL": f"smtp+starttls://user:{SECRET}@mail",
    "MAIL_FROM": "Sign-up <no-reply@example.com>",
    "PUBLIC_URL": "https://example.com/",
    "SECRET_KEY": SECRET * 8,
}
Settings = type[RelaySettings] | type[ServiceSettings] | type[WorkerSettings] | type[DatabaseSettings]


def read(settings: Settings) -> DatabaseSettings:
    """Reads settings as the processes do."""
    read_settings = settings.from_environment()
    if isinstance(read_settings, RelaySettings | WorkerSettings):
        redis_connection.check_url(read_settings.redis_url)
    return read_settings


def refusal(settings: Settings, name: str) -> str:
    """Returns the sentence with which a variable's value is refused: one line that names it and shows no secret."""
    with pytest.raises(SettingsError) as caught:
        read(settings)
    text = str(caught.value)
    assert text.startswith(f"{name} is wrong: ")
    assert "\n" not in text
    assert SECRET not in text
    return text
