"""What each process reads from its environment."""

import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from outbox.devstack.environment import read_settings
from outbox.errors import SettingsError
from outbox.runtime import redis_url
from outbox.runtime.endpoints import Address, SmtpServer
from outbox.runtime.settings import DatabaseSettings, RelaySettings, ServiceSettings, WorkerSettings

if TYPE_CHECKING:
    import trustme

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


def read(settings: Settings) -> DatabaseSettings:
    """Reads settings as the processes do."""
    found = settings.from_environment()
    if isinstance(found, RelaySettings | WorkerSettings):
        redis_url.check(found.redis_url)
    return found


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


_CHECKED_OPTIONS = [
    *("sslmode", "sslnegotiation", "sslcertmode", "gssencmode", "channel_binding", "require_auth", "service"),
    *("target_session_attrs", "load_balance_hosts", "ssl_min_protocol_version", "min_protocol_version"),
    *("keepalives", "keepalives_idle", "tcp_user_timeout", "connect_timeout", "port"),
]
"""Options of a Postgres URL of which a wrong value lets no try to connect get as far as to a server."""

_WRONG: list[tuple[Settings, str, list[str]]] = [
    (
        DatabaseSettings,
        "DATABASE_URL",
        [
            *("hunter2", "mysql://u:hunter2@h/d", "postgresql://u:hunter2%zz@h/d", "postgresql://u@h/d?hunter2=1"),
            *("postgresql://h:hunter2/d", "postgresql://u:pass@wo:rd@hunter2/d", "postgresql://h/d?port=5432,hunter2"),
            *(
                "postgresql://u:pass@hunter2@h/d",
                "postgresql://u:pass@hunter2@a,b/d",
                "postgresql://a,pass@hunter2@b/d",
                "postgresql://u:pass@@hunter2@h/d",
                "postgresql://u:pass@/hunter2@h/d",
                "postgresql://u:pass@word/hunter2@h/d",
            ),
            *("postgresql://u:hunter2@h:0/d", "postgresql://u:hunter2@h:65536/d", "postgresql://u:hunter2@h:-1/d"),
            *("postgresql://a,b/d?port=1,2,3", "postgresql:///d?port=1,2", "postgresql://a,b/d?hostaddr=::1"),
            *(f"postgresql://h/d?{name}=hunter2" for name in _CHECKED_OPTIONS),
            *(
                "postgresql://h/d?sslmode=",
                "postgresql://h/d?sslmode=REQUIRE",
                "postgresql://h/d?sslmode=a&require_auth=b",
            ),
            *("postgresql://h/d?sslrootcert=system&sslmode=require", "postgresql://h/d?hostaddr=hunter2"),
        ],
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
            *(
                "redis://:hunter2@h?db=1.5",
                "redis://:hunter2@h?db=-1",
                "redis://h?health_check_interval=1.5",
                "rediss://h?ssl_min_version=hunter2",
                "rediss://h?ssl_min_version=5",
                "rediss://h?ssl_min_version=99999999999999999999",
                "rediss://h?ssl_cert_reqs=hunter2",
                "rediss://h?ssl_ca_certs=/hunter2",
                "rediss://h?ssl_certfile=/hunter2",
                "rediss://h?ssl_keyfile=/hunter2",
                "rediss://h?ssl_ca_certs=%00",
                "redis://:hunter2@h?ssl_cert_reqs=none",
                "redis://h?ssl_password=hunter2",
                "unix:///a.sock?ssl_ca_certs=/hunter2",
            ),
        ],
    ),
    (WorkerSettings, "SMTP_URL", ["hunter2", "http://u:hunter2@h", "smtp://", "smtp://hunter2@h", "smtp://h:hunter2"]),
    (WorkerSettings, "MAIL_FROM", ["hunter2", "@", "hunter2@", "a@b\r\nBcc: hunter2@c", "a@b, hunter2"]),
    (
        WorkerSettings,
        "PUBLIC_URL",
        [
            *("hunter2", "ftp://hunter2", "https://", "//hunter2", "https://a/?hunter2", "https://a/#hunter2"),
            *("https://hunter2\n", "https://a\nhunter2", " https://hunter2", "https://hunter2/<b>", "https://hunter2#"),
            *("https://hunter2:abc", "https://hunter2:99999", "https://[hunter2", "https://user:hunter2@a"),
        ],
    ),
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
    """One sentence says which variable and what is wrong with it; the value, which may be a secret, stays out."""
    environment.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        read(settings)
    text = str(caught.value)
    assert text.startswith(f"{name} is wrong: ")
    assert "\n" not in text
    assert SECRET not in text


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("DATABASE_URL", "postgresql://h/d?sslmode=always&sslsni=1", "or not with such a value: sslmode"),
        ("DATABASE_URL", "postgresql://h/d?ssl_min_protocol_version=x", "such a value: ssl_min_protocol_version"),
        ("DATABASE_URL", "postgresql://h/d?require_auth=x", "such a value: require_auth"),
        ("DATABASE_URL", "postgresql://h/d?min_protocol_version=x", "such a value: min_protocol_version"),
        ("DATABASE_URL", "postgresql://h/d?sslrootcert=system&sslmode=require", "a value: sslmode, sslrootcert"),
        ("DATABASE_URL", "postgresql://h/d?connect_timeout=x", "connect_timeout that is not a whole number"),
        ("DATABASE_URL", "postgresql://h/d?keepalives=yes", "keepalives that is not a whole number"),
        ("DATABASE_URL", "postgresql://h:p/d", "a port that is not a number from 1 to 65535"),
        ("REDIS_URL", "redis://h?db=1.5", "db that is not a whole number"),
        ("REDIS_URL", "redis://h?db=1&ssl_password=p&client_name=n", "ssl_password"),
        ("REDIS_URL", "unix:///a.sock?ssl_cert_reqs=none&ssl_ca_path=/", "ssl_ca_path, ssl_cert_reqs"),
        ("REDIS_URL", "rediss://h?ssl_ca_path=/&ssl_cert_reqs=never", "ssl_cert_reqs"),
        ("REDIS_URL", "rediss://h?ssl_min_version=1.2", "ssl_min_version"),
        ("REDIS_URL", "rediss://h?ssl_min_version=12", "ssl_min_version"),
        ("REDIS_URL", "rediss://h?ssl_ca_certs=/none", "ssl_ca_certs or ssl_ca_path that cannot be used: No such file"),
        ("REDIS_URL", "rediss://h?ssl_certfile=/none", "ssl_certfile or ssl_keyfile that cannot be used: No such file"),
        ("REDIS_URL", "rediss://h?ssl_ca_certs=%00", "ssl_ca_certs or ssl_ca_path that cannot be used: embedded null"),
    ],
)
def test_the_option_that_is_wrong_is_named(name: str, value: str, named: str, environment: pytest.MonkeyPatch) -> None:
    """Of a URL's options the sentence names the one that is wrong, and no other."""
    environment.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        read(RelaySettings)
    text = str(caught.value)
    assert named in text
    assert "client_name" not in text
    assert not re.search(r"\bdb\b", text) or named.startswith("db ")


@pytest.mark.parametrize(
    "url",
    [
        *(
            "postgresql://",
            "postgresql:///d",
            "postgresql://u@h:5433/d",
            "postgresql://[::1]/d",
            "postgresql:///d?host=/tmp",
            "postgresql://u:p%40@h/d%40?application_name=a@b",
        ),
        *("postgresql://a,b/d", "postgresql://a:1,b:2/d", "postgresql://a,b/d?port=1", "postgresql://a,/d"),
        *("postgresql:///d?hostaddr=::1,::2&port=1,2", "postgresql://a,b/d?hostaddr=::1,::2"),
        *(f"postgresql://h/d?sslmode={mode}" for mode in ("disable", "allow", "prefer", "require", "verify-full")),
        *("postgresql://h/d?sslrootcert=system", "postgresql://h/d?sslmode=require&sslnegotiation=direct"),
        *("postgresql://h/d?gssencmode=disable&require_auth=scram-sha-256", "postgresql://h/d?keepalives=0"),
        *("postgresql://a,b/d?target_session_attrs=read-write", "postgresql://a,b/d?load_balance_hosts=random"),
    ],
)
def test_a_postgres_may_be_reached_in_many_ways(url: str, environment: pytest.MonkeyPatch) -> None:
    """By one host or several, addresses, sockets, TLS: what libpq takes is no mistake."""
    environment.setenv("DATABASE_URL", url)
    assert DatabaseSettings.from_environment().database_url == url


def test_libpqs_own_variables_may_name_the_servers(environment: pytest.MonkeyPatch) -> None:
    """What a URL leaves open, they fill."""
    environment.setenv("DATABASE_URL", "postgresql:///d")
    environment.setenv("PGHOST", "a,b")
    environment.setenv("PGPORT", "1,2")
    DatabaseSettings.from_environment()
    environment.setenv("PGPORT", "1,2,3")
    with pytest.raises(SettingsError, match="variables such as PG"):
        DatabaseSettings.from_environment()


@pytest.mark.parametrize("name", [*GOOD, "OUTBOX_HANDLERS"])
def test_what_is_not_utf8_is_refused(name: str, environment: pytest.MonkeyPatch) -> None:
    """Such as a key of random bytes: each mail would fail for it, and spend its attempts."""
    environment.setenv(name, f"{GOOD.get(name, '')}\udcff")
    with pytest.raises(SettingsError) as caught:
        WorkerSettings.from_environment()
    assert str(caught.value) == f"{name} is wrong: it is not in UTF-8"


@pytest.mark.parametrize("servers", ["//127.0.0.1:{0}", "///d?hostaddr=127.0.0.1&port={0}", "//127.0.0.1:{0},h:x"])
@pytest.mark.parametrize("variable", ["PGUSER", "PGHOSTADDR"])
def test_a_url_is_checked_without_a_connection(servers: str, variable: str, environment: pytest.MonkeyPatch) -> None:
    """Whether the server is there is not the settings' business."""
    environment.setenv(variable, "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        environment.setenv("DATABASE_URL", f"postgresql:{servers.format(listener.getsockname()[1])}")
        with suppress(SettingsError):
            DatabaseSettings.from_environment()
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.fixture
def certificate(tmp_path: Path, authority: "trustme.CA") -> str:
    """Options of a Redis URL: a certificate of ours, whose key has the password `hunter2`, and who has issued it."""
    from cryptography.hazmat.primitives import serialization

    issued = authority.issue_cert("h")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(SECRET.encode()),
    )
    (tmp_path / "key.pem").write_bytes(key)
    issued.cert_chain_pems[0].write_to_path(tmp_path / "ours.pem")
    return f"ssl_ca_certs={tmp_path}/ca.pem&ssl_certfile={tmp_path}/ours.pem&ssl_keyfile={tmp_path}/key.pem"


def test_a_redis_may_be_reached_by_tls(tmp_path: Path, certificate: str, environment: pytest.MonkeyPatch) -> None:
    """With certificates of one's own, on either side, and with a password for the key."""
    good = (f"{certificate}&ssl_password={SECRET}", f"ssl_ca_path={tmp_path}", "ssl_cert_reqs=none")
    for options in (*good, "ssl_min_version=772", "ssl_check_hostname=no"):
        environment.setenv("REDIS_URL", f"rediss://h?{options}")
        read(RelaySettings)


@pytest.mark.parametrize("password", ["", "&ssl_password=wrong"])
def test_a_key_needs_its_password(password: str, certificate: str, environment: pytest.MonkeyPatch) -> None:
    """Without it, OpenSSL would ask for it on the terminal at every connection."""
    environment.setenv("REDIS_URL", f"rediss://h?{certificate}{password}")
    with pytest.raises(SettingsError, match="ssl_certfile or ssl_keyfile that cannot be used"):
        read(RelaySettings)


def test_the_service_does_not_import_redis() -> None:
    """It never talks to Redis, and reads its settings without the client's memory and time."""
    code = (
        "import sys, outbox_service.main, outbox.runtime.settings as s; s.ServiceSettings.from_environment();"
        "sys.exit('redis' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0


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


def test_outbox_up_tells_all_mistakes_before_it_starts_anything(environment: pytest.MonkeyPatch) -> None:
    """Of each process' settings, and once where several share them."""
    environment.setenv("HTTP_SERVER_ADDRESS", "nonsense")
    environment.setenv("REDIS_URL", "rediss://h?ssl_min_version=1")
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == ["HTTP_SERVER_ADDRESS", "REDIS_URL"]


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
