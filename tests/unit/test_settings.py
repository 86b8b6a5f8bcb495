"""What each process reads from its environment."""

from typing import Any

import pytest

from outbox.endpoints import Address, SmtpServer
from outbox.errors import SettingsError
from outbox.settings import DatabaseSettings, RelaySettings, ServiceSettings, WorkerSettings

SECRET = "hunter2"
GOOD = {
    "DATABASE_URL": f"postgresql://outbox:{SECRET}@db:5432/outbox",
    "REDIS_URL": f"redis://:{SECRET}@redis:6379/0",
    "SMTP_URL": f"smtp+starttls://user:{SECRET}@mail",
    "MAIL_FROM": "Sign-up <no-reply@example.com>",
    "PUBLIC_URL": "https://example.com/",
    "SECRET_KEY": SECRET * 8,
}
Settings = type[RelaySettings] | type[ServiceSettings] | type[WorkerSettings] | type[DatabaseSettings]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment with what must be set, and nothing else of ours."""
    import os

    for name in list(os.environ):
        if name.startswith(("OUTBOX_", "LOG_", "HTTP_SERVER", "VERIFY_")) or name in GOOD:
            monkeypatch.delenv(name)
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_defaults_suit_production() -> None:
    """With nothing set but what must be, every value is the documented one."""
    relay = RelaySettings.from_environment()
    assert relay.model_dump(exclude={"database_url", "redis_url"}) == {
        "transaction_pooling": False,
        "log_level": "info",
        "log_format": None,
        "queues": {"critical": 10, "default": 5},
        "lease": 15,
        "poll_interval": 1,
        "batch": 2000,
        "window": 10_000,
        "horizon": 60,
        "sweep_interval": 2,
        "sweep_grace": 1,
        "retention": 86_400,
    }
    service = ServiceSettings.from_environment()
    assert service.http_server_address == Address("127.0.0.1", 8080)
    assert service.verify_email_delay == 10
    worker = WorkerSettings.from_environment()
    assert worker.queues == {"critical": 10, "default": 5}
    assert worker.handlers == ()
    assert worker.public_url == "https://example.com"
    assert worker.smtp_server == SmtpServer("mail", 587, "starttls", "user", SECRET)


def test_settings_never_show_a_secret() -> None:
    """Settings may end up in a log or a traceback."""
    for settings in (RelaySettings, ServiceSettings, WorkerSettings):
        assert SECRET not in repr(settings.from_environment())
        assert SECRET not in str(settings.from_environment())


def test_settings_are_frozen() -> None:
    """They are passed down as one object that nobody changes."""
    with pytest.raises(ValueError, match="frozen"):
        RelaySettings.from_environment().batch = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "name"),
    [(DatabaseSettings, "DATABASE_URL"), (RelaySettings, "REDIS_URL"), (ServiceSettings, "SECRET_KEY")]
    + [(WorkerSettings, name) for name in GOOD],
)
@pytest.mark.parametrize("empty", [True, False])
def test_what_is_missing_is_named(
    settings: Settings, name: str, *, empty: bool, environment: pytest.MonkeyPatch
) -> None:
    """Unset and empty are the same; the sentence says what to set the variable to."""
    if empty:
        environment.setenv(name, "")
    else:
        environment.delenv(name)
    with pytest.raises(SettingsError) as caught:
        settings.from_environment()
    assert str(caught.value).startswith(f"{name} is not set: set it to ")
    assert "\n" not in str(caught.value)


_WRONG: list[tuple[Settings, str, list[str]]] = [
    (
        DatabaseSettings,
        "DATABASE_URL",
        ["hunter2", "mysql://u:hunter2@h/d", "postgresql://u:hunter2%zz@h/d", "postgresql://u@h/d?hunter2=1"],
    ),
    (
        RelaySettings,
        "REDIS_URL",
        [
            *(
                "hunter2",
                "http://:hunter2@h",
                "redis://:hunter2@h:port/0",
                "redis://:hunter2@h/db",
                "unix://",
                "unix:/run/redis.sock",
                "redis:localhost",
                "REDIS://localhost",
                "redis://[h",
            ),
            *(
                "redis://h/0?decode_responses=hunter2",
                "redis://h/0?health_check_interval=hunter2",
                "redis://h/0?socket_timeout=1",
                "redis://h/0?max_connections=1",
                "redis://h/0?protocol=3",
            ),
        ],
    ),
    (WorkerSettings, "SMTP_URL", ["hunter2", "http://u:hunter2@h", "smtp://", "smtp://hunter2@h", "smtp://h:hunter2"]),
    (WorkerSettings, "MAIL_FROM", ["hunter2", "@", "hunter2@", "a@b\r\nBcc: hunter2@c", "a@b, hunter2"]),
    (
        WorkerSettings,
        "PUBLIC_URL",
        ["hunter2", "ftp://hunter2", "https://", "//hunter2", "https://a/?hunter2", "https://a/#hunter2"],
    ),
    (WorkerSettings, "SECRET_KEY", ["hunter2"]),
    (ServiceSettings, "SECRET_KEY", ["hunter2"]),
    (ServiceSettings, "HTTP_SERVER_ADDRESS", ["hunter2", "h:hunter2", "h:65536", "h:-1", "8080"]),
    (ServiceSettings, "VERIFY_EMAIL_DELAY", ["hunter2", "-1", "nan", "inf", "1e99"]),
    (ServiceSettings, "OUTBOX_HASH_QUEUE", ["hunter2", "0", "1.5"]),
    (ServiceSettings, "OUTBOX_POOL_SIZE", ["hunter2", "0", "1001"]),
    (ServiceSettings, "LOG_LEVEL", ["hunter2"]),
    (ServiceSettings, "LOG_FORMAT", ["hunter2"]),
    (
        RelaySettings,
        "OUTBOX_QUEUES",
        [
            "hunter2",
            "critical=hunter2",
            "=1",
            "a=0",
            "a=-1",
            "a=1.5",
            "a=1,",
            "two words=1",
            f"{'x' * 51}=1",
            "a=1,b=2,a=3",
        ],
    ),
    (RelaySettings, "OUTBOX_LEASE", ["hunter2", "0", "-1", "nan", "inf"]),
    (RelaySettings, "OUTBOX_POLL_INTERVAL", ["hunter2", "0"]),
    (RelaySettings, "OUTBOX_BATCH", ["hunter2", "0", "100001", "1.5"]),
    (RelaySettings, "OUTBOX_WINDOW", ["hunter2", "0"]),
    (RelaySettings, "OUTBOX_HORIZON", ["hunter2", "0", "nan"]),
    (RelaySettings, "OUTBOX_SWEEP_INTERVAL", ["hunter2", "0"]),
    (RelaySettings, "OUTBOX_SWEEP_GRACE", ["hunter2", "0"]),
    (RelaySettings, "OUTBOX_RETENTION", ["hunter2", "0", "31536001"]),
    (WorkerSettings, "OUTBOX_CONCURRENCY", ["hunter2", "0", "1001"]),
    (WorkerSettings, "OUTBOX_GRACE", ["hunter2", "0"]),
    (WorkerSettings, "OUTBOX_SMTP_TIMEOUT", ["hunter2", "0"]),
    (WorkerSettings, "OUTBOX_LINK_LIFETIME", ["hunter2", "0"]),
]


@pytest.mark.parametrize(
    ("settings", "name", "value"), [(settings, name, value) for settings, name, values in _WRONG for value in values]
)
def test_what_is_wrong_is_named_and_not_shown(
    settings: Settings, name: str, value: str, environment: pytest.MonkeyPatch
) -> None:
    """One sentence says which variable and what is wrong with it; the value, which may be a secret, stays out."""
    environment.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        settings.from_environment()
    text = str(caught.value)
    assert text.startswith(f"{name} is wrong: ")
    assert "\n" not in text
    assert SECRET not in text


def test_all_mistakes_are_told_at_once(environment: pytest.MonkeyPatch) -> None:
    """Nobody has to start the process five times to find five mistakes."""
    environment.delenv("DATABASE_URL")
    environment.setenv("REDIS_URL", "nonsense")
    environment.setenv("SMTP_URL", "nonsense")
    environment.setenv("OUTBOX_LEASE", "nonsense")
    with pytest.raises(SettingsError) as caught:
        WorkerSettings.from_environment()
    lines = sorted(line.split(" ")[0] for line in str(caught.value).splitlines())
    assert lines == ["DATABASE_URL", "OUTBOX_LEASE", "REDIS_URL", "SMTP_URL"]


def test_other_programs_variables_are_not_ours(environment: pytest.MonkeyPatch) -> None:
    """BATCH, LEASE or CONCURRENCY may be set for anything; only documented names count."""
    for name in ("BATCH", "LEASE", "WINDOW", "CONCURRENCY", "HANDLERS", "GRACE", "QUEUES", "RETENTION", "POOL_SIZE"):
        environment.setenv(name, "nonsense")
    assert RelaySettings.from_environment().batch == 2000
    assert WorkerSettings.from_environment().handlers == ()
    assert ServiceSettings.from_environment().pool_size == 10


@pytest.mark.parametrize(
    ("value", "weights"),
    [
        ("critical=10,default=5", {"critical": 10, "default": 5}),
        (" a = 1 , b=2 ", {"a": 1, "b": 2}),
        ("mails_1-x=7", {"mails_1-x": 7}),
    ],
)
def test_queue_weights(value: str, weights: dict[str, int], environment: pytest.MonkeyPatch) -> None:
    """Names and weights, in their order."""
    environment.setenv("OUTBOX_QUEUES", value)
    assert list(RelaySettings.from_environment().queues.items()) == list(weights.items())


@pytest.mark.parametrize(
    ("settings", "name", "value", "attribute", "expected"),
    [
        (ServiceSettings, "HTTP_SERVER_ADDRESS", "0.0.0.0:80", "http_server_address", Address("0.0.0.0", 80)),
        (ServiceSettings, "HTTP_SERVER_ADDRESS", "[::1]:0", "http_server_address", Address("::1", 0)),
        (ServiceSettings, "VERIFY_EMAIL_DELAY", "0", "verify_email_delay", 0.0),
        (ServiceSettings, "LOG_LEVEL", "DEBUG", "log_level", "debug"),
        (WorkerSettings, "SMTP_URL", "smtp://h", "smtp_server", SmtpServer("h", 25, "none", None)),
        (WorkerSettings, "SMTP_URL", "smtps://u:p%40%2F@h:1", "smtp_server", SmtpServer("h", 1, "tls", "u", "p@/")),
        (WorkerSettings, "SMTP_URL", "smtps://h", "smtp_server", SmtpServer("h", 465, "tls", None)),
        (WorkerSettings, "OUTBOX_HANDLERS", "a.b, c,", "handlers", ("a.b", "c")),
        (RelaySettings, "REDIS_URL", "rediss://u:p@h", "redis_url", "rediss://u:p@h"),
        (RelaySettings, "REDIS_URL", "unix:///a.sock?db=1", "redis_url", "unix:///a.sock?db=1"),
        (RelaySettings, "DATABASE_URL", "postgres:///x?host=/tmp", "database_url", "postgres:///x?host=/tmp"),
    ],
)
def test_good_values_are_read(
    settings: Settings, name: str, value: str, *, attribute: str, expected: Any, environment: pytest.MonkeyPatch
) -> None:
    """What is documented works."""
    environment.setenv(name, value)
    assert getattr(settings.from_environment(), attribute) == expected


def test_an_ipv6_address_is_written_with_brackets() -> None:
    """An address reads as it is set."""
    assert str(Address("::1", 80)) == "[::1]:80"
    assert str(Address("127.0.0.1", 80)) == "127.0.0.1:80"
