"""The settings that each process reads from its environment."""

import subprocess
import sys
from typing import Any

import pytest

from outbox.devstack.environment import read_settings
from outbox.errors import SettingsError
from outbox.runtime.endpoints import Address, SmtpServer
from outbox.runtime.settings import DatabaseSettings, RelaySettings, ServiceSettings, WorkerSettings
from tests.support.settings import REQUIRED, SECRET, Settings, refusal

pytestmark = pytest.mark.usefixtures("environment")


def test_defaults_suit_production() -> None:
    """With only the required variables set, every value is the documented one."""
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
        "idempotency_retention": 86_400,
        "unverified_retention": None,
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
    """Settings may appear in a log or a traceback."""
    for settings in (RelaySettings, ServiceSettings, WorkerSettings):
        assert SECRET not in repr(settings.from_environment())
        assert SECRET not in str(settings.from_environment())


def test_settings_are_frozen() -> None:
    """They are passed down as one object that no code changes."""
    with pytest.raises(ValueError, match="frozen"):
        RelaySettings.from_environment().batch = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "name"),
    [(DatabaseSettings, "DATABASE_URL"), (RelaySettings, "REDIS_URL"), (ServiceSettings, "SECRET_KEY")]
    + [(WorkerSettings, name) for name in REQUIRED],
)
@pytest.mark.parametrize("empty", [True, False])
def test_a_missing_variable_is_named(
    settings: Settings, name: str, *, empty: bool, environment: pytest.MonkeyPatch
) -> None:
    """Unset and empty mean the same; the sentence says what to set the variable to."""
    if empty:
        environment.setenv(name, "")
    else:
        environment.delenv(name)
    with pytest.raises(SettingsError) as caught:
        settings.from_environment()
    assert str(caught.value).startswith(f"{name} is not set: set it to ")
    assert "\n" not in str(caught.value)


_WRONG: list[tuple[Settings, str, list[str]]] = [
    (WorkerSettings, "MAIL_FROM", ["hunter2", "@", "hunter2@", "a@b\r\nBcc: hunter2@c", "a@b, hunter2"]),
    (WorkerSettings, "SECRET_KEY", ["hunter2"]),
    (ServiceSettings, "SECRET_KEY", ["hunter2"]),
    (ServiceSettings, "HTTP_SERVER_ADDRESS", ["hunter2", "h:hunter2", "h:65536", "h:-1", "8080"]),
    (ServiceSettings, "HTTP_SERVER_ADDRESS", ["http://hunter2:80", "hunter2 x:80", "*hunter2:80", "[hunter2:80"]),
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
    (RelaySettings, "OUTBOX_LEASE", ["hunter2", "0", "-1", "nan", "inf", "301"]),
    (RelaySettings, "OUTBOX_POLL_INTERVAL", ["hunter2", "0"]),
    (RelaySettings, "OUTBOX_BATCH", ["hunter2", "0", "100001", "1.5"]),
    (RelaySettings, "OUTBOX_WINDOW", ["hunter2", "0", "9223372036854775807"]),
    (RelaySettings, "OUTBOX_HORIZON", ["hunter2", "0", "nan"]),
    (RelaySettings, "OUTBOX_SWEEP_INTERVAL", ["hunter2", "0"]),
    (RelaySettings, "OUTBOX_SWEEP_GRACE", ["hunter2", "0"]),
    (RelaySettings, "OUTBOX_RETENTION", ["hunter2", "0", "31536001"]),
    (RelaySettings, "OUTBOX_IDEMPOTENCY_RETENTION", ["hunter2", "0", "31536001"]),
    (RelaySettings, "OUTBOX_UNVERIFIED_RETENTION", ["hunter2", "0", "31536001", "off"]),
    (WorkerSettings, "OUTBOX_CONCURRENCY", ["hunter2", "0", "1001"]),
    (WorkerSettings, "OUTBOX_GRACE", ["hunter2", "0"]),
    (WorkerSettings, "OUTBOX_SMTP_TIMEOUT", ["hunter2", "0"]),
    (WorkerSettings, "OUTBOX_MAIL_CONNECTIONS", ["hunter2", "0", "1001"]),
    (WorkerSettings, "OUTBOX_SMTP_HELO", ["my_hunter2", "two words", "hunter2\r\nRSET", "[hunter2", "hunter2."]),
    (WorkerSettings, "OUTBOX_LINK_LIFETIME", ["hunter2", "0"]),
    (WorkerSettings, "OUTBOX_HANDLER_CONNECTIONS", ["hunter2", "0", "1001", "1.5"]),
    (WorkerSettings, "OUTBOX_UNHANDLED_GRACE", ["hunter2", "-1", "nan", "31536001"]),
]


@pytest.mark.parametrize(
    ("settings", "name", "value"), [(settings, name, value) for settings, name, values in _WRONG for value in values]
)
def test_what_is_wrong_is_named_and_not_shown(
    settings: Settings, name: str, value: str, environment: pytest.MonkeyPatch
) -> None:
    """One sentence names the variable and what is wrong; the value, which may be a secret, is not shown."""
    environment.setenv(name, value)
    refusal(settings, name)


@pytest.mark.parametrize("name", [*REQUIRED, "OUTBOX_HANDLERS"])
def test_a_value_that_is_not_utf8_is_refused(name: str, environment: pytest.MonkeyPatch) -> None:
    """With a key of random bytes, for example, each mail would fail and use up its attempts."""
    environment.setenv(name, f"{REQUIRED.get(name, '')}\udcff")
    with pytest.raises(SettingsError) as caught:
        WorkerSettings.from_environment()
    assert str(caught.value) == f"{name} is wrong: it is not in UTF-8"


def test_the_service_does_not_import_redis() -> None:
    """It never talks to Redis, and starts without the client's memory and import time."""
    code = (
        "import sys, outbox_service.main, outbox.runtime.settings as s; s.ServiceSettings.from_environment();"
        "sys.exit('redis' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0


def test_all_mistakes_are_reported_at_once(environment: pytest.MonkeyPatch) -> None:
    """A user does not have to start the process four times to find four mistakes."""
    environment.delenv("DATABASE_URL")
    environment.setenv("REDIS_URL", "nonsense")
    environment.setenv("SMTP_URL", "nonsense")
    environment.setenv("OUTBOX_LEASE", "nonsense")
    with pytest.raises(SettingsError) as caught:
        WorkerSettings.from_environment()
    lines = sorted(line.split(" ")[0] for line in str(caught.value).splitlines())
    assert lines == ["DATABASE_URL", "OUTBOX_LEASE", "REDIS_URL", "SMTP_URL"]


def test_outbox_up_reports_all_mistakes_before_it_starts_anything(environment: pytest.MonkeyPatch) -> None:
    """It checks the settings of each process, and reports a shared setting once."""
    environment.setenv("HTTP_SERVER_ADDRESS", "nonsense")
    environment.setenv("REDIS_URL", "rediss://h?ssl_min_version=1")
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == ["HTTP_SERVER_ADDRESS", "REDIS_URL"]


def test_variables_of_other_programs_are_ignored(environment: pytest.MonkeyPatch) -> None:
    """Another program may use BATCH, LEASE or CONCURRENCY; only documented names count."""
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
    """Names and weights, in the order given."""
    environment.setenv("OUTBOX_QUEUES", value)
    assert list(RelaySettings.from_environment().queues.items()) == list(weights.items())


@pytest.mark.parametrize(
    ("settings", "name", "value", "attribute", "expected"),
    [
        (ServiceSettings, "HTTP_SERVER_ADDRESS", "0.0.0.0:80", "http_server_address", Address("0.0.0.0", 80)),
        (ServiceSettings, "HTTP_SERVER_ADDRESS", "[::1]:0", "http_server_address", Address("::1", 0)),
        (ServiceSettings, "VERIFY_EMAIL_DELAY", "0", "verify_email_delay", 0.0),
        (ServiceSettings, "LOG_LEVEL", "DEBUG", "log_level", "debug"),
        (WorkerSettings, "OUTBOX_HANDLERS", "a.b, c,", "handlers", ("a.b", "c")),
    ],
)
def test_good_values_are_read(
    settings: Settings, name: str, value: str, *, attribute: str, expected: Any, environment: pytest.MonkeyPatch
) -> None:
    """Documented formats work."""
    environment.setenv(name, value)
    assert getattr(settings.from_environment(), attribute) == expected


def test_an_ipv6_address_is_shown_with_brackets() -> None:
    """An address is shown in the format in which it is set."""
    assert str(Address("::1", 80)) == "[::1]:80"
    assert str(Address("127.0.0.1", 80)) == "127.0.0.1:80"
