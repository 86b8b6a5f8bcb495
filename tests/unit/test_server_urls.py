"""The URLs of servers and of the service in settings: DATABASE_URL, REDIS_URL, SMTP_URL, PUBLIC_URL."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outbox.runtime.endpoints import SmtpServer
from outbox.runtime.settings import DatabaseSettings, RelaySettings, WorkerSettings
from tests.support.settings import SECRET, Settings, read, refusal

if TYPE_CHECKING:
    import trustme

pytestmark = pytest.mark.usefixtures("environment")

WRONG: list[tuple[Settings, str, list[str]]] = [
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
            ),
            *("postgresql://u:pass@@hunter2@h/d", "postgresql://u:pass@/hunter2@h/d"),
            *("postgresql://u:pass@word/hunter2@h/d", "postgresql://u:hunter2@h:-1/d"),
            *("postgresql://u:hunter2@h:0/d", "postgresql://u:hunter2@h:65536/d", "postgresql://h/d?sslmode=hunter2"),
            *("postgresql://h/d?sslmode=", "postgresql://h/d?sslmode=REQUIRE"),
        ],
    ),
    (
        RelaySettings,
        "REDIS_URL",
        [
            *("hunter2", "http://:hunter2@h", "redis://:hunter2@h:port/0", "redis://:hunter2@h/db", "unix://"),
            *("unix:/run/redis.sock", "redis:localhost", "REDIS://localhost", "redis://[h"),
            *("redis://h/0?decode_responses=hunter2", "redis://h/0?health_check_interval=hunter2"),
            *("redis://h/0?socket_timeout=1", "redis://h/0?max_connections=1", "redis://h/0?protocol=3"),
            *("redis://:hunter2@h?db=1.5", "redis://h?health_check_interval=1.5"),
            *("rediss://h?ssl_min_version=hunter2", "rediss://h?ssl_min_version=1.2", "rediss://h?ssl_min_version=5"),
            *("rediss://h?ssl_cert_reqs=hunter2", "rediss://h?ssl_ca_certs=/hunter2", "rediss://h?ssl_ca_certs=%00"),
            *("rediss://h?ssl_certfile=/hunter2", "rediss://h?ssl_keyfile=/hunter2"),
            *("redis://:hunter2@h?ssl_cert_reqs=none", "redis://h?ssl_password=hunter2"),
            "unix:///a.sock?ssl_ca_certs=/hunter2",
        ],
    ),
    (WorkerSettings, "SMTP_URL", ["hunter2", "http://u:hunter2@h", "smtp://", "smtp://hunter2@h", "smtp://h:hunter2"]),
    (
        WorkerSettings,
        "PUBLIC_URL",
        [
            *("hunter2", "ftp://hunter2", "https://", "//hunter2", "https://a/?hunter2", "https://a/#hunter2"),
            *("https://hunter2\n", "https://a\nhunter2", " https://hunter2", "https://hunter2/<b>", "https://hunter2#"),
            *("https://hunter2:abc", "https://hunter2:99999", "https://[hunter2", "https://user:hunter2@a"),
        ],
    ),
]


@pytest.mark.parametrize(
    ("settings", "name", "value"), [(settings, name, value) for settings, name, values in WRONG for value in values]
)
def test_a_wrong_url_is_named_and_not_shown(
    settings: Settings, name: str, value: str, environment: pytest.MonkeyPatch
) -> None:
    """One sentence names the variable and what is wrong; the URL, which may hold a password, is not shown."""
    environment.setenv(name, value)
    refusal(settings, name)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("DATABASE_URL", "postgresql://h/d?sslmode=always", "an sslmode that is none of disable, allow, prefer"),
        ("DATABASE_URL", "postgresql://h:p/d", "a port that is not a number from 1 to 65535"),
        ("DATABASE_URL", "postgresql://u:p@ss@h/d", "percent-encode special characters in the password"),
        ("REDIS_URL", "redis://h?db=1.5", "redis-py refuses: Invalid value for 'db'"),
        ("REDIS_URL", "redis://h?db=1&ssl_password=p&client_name=n", "ssl_password"),
        ("REDIS_URL", "rediss://h?ssl_cert_reqs=never", "redis-py refuses: Invalid SSL Certificate Requirements Flag"),
        ("REDIS_URL", "rediss://h?ssl_min_version=1.2", "neither 771 (TLS 1.2) nor 772 (TLS 1.3)"),
        ("REDIS_URL", "rediss://h?ssl_ca_certs=/none", "ssl_ca_certs with a file that cannot be read: No such file"),
        ("REDIS_URL", "rediss://h?ssl_keyfile=/none", "ssl_keyfile with a file that cannot be read: No such file"),
    ],
)
def test_a_wrong_option_is_named(name: str, value: str, reason: str, environment: pytest.MonkeyPatch) -> None:
    """The sentence says which option is wrong and what is wrong with it."""
    environment.setenv(name, value)
    assert reason in refusal(RelaySettings, name)


@pytest.mark.parametrize(
    "url",
    [
        *("postgresql://", "postgresql:///d", "postgresql://u@h:5433/d", "postgresql://[::1]/d"),
        *("postgresql:///d?host=/tmp", "postgres:///x?host=/tmp", "postgresql://u:p%40@h/d%40?application_name=a@b"),
        *("postgresql://a,b/d", "postgresql://a:1,b:2/d", "postgresql://a,b/d?port=1", "postgresql://a,/d"),
        *("postgresql:///d?hostaddr=::1,::2&port=1,2", "postgresql://a,b/d?hostaddr=::1,::2"),
        *(f"postgresql://h/d?sslmode={mode}" for mode in ("disable", "allow", "prefer", "require", "verify-full")),
        *("postgresql://h/d?sslrootcert=system", "postgresql://a,b/d?target_session_attrs=read-write"),
    ],
)
def test_every_kind_of_postgres_url_is_accepted(url: str, environment: pytest.MonkeyPatch) -> None:
    """One host or several, addresses, sockets, TLS."""
    environment.setenv("DATABASE_URL", url)
    assert DatabaseSettings.from_environment().database_url == url


@pytest.mark.parametrize("url", ["rediss://u:p@h", "unix:///a.sock?db=1"])
def test_every_kind_of_redis_url_is_accepted(url: str, environment: pytest.MonkeyPatch) -> None:
    """TLS and sockets too."""
    environment.setenv("REDIS_URL", url)
    settings = read(RelaySettings)
    assert isinstance(settings, RelaySettings)
    assert settings.redis_url == url


@pytest.mark.parametrize(
    "options",
    [
        "ssl_ca_certs={0}/ca.pem&ssl_certfile={0}/own.pem&ssl_keyfile={0}/own.pem&ssl_password=p",
        *("ssl_ca_path={0}", "ssl_cert_reqs=none", "ssl_min_version=772", "ssl_check_hostname=no"),
    ],
)
def test_redis_options_for_tls_are_accepted(
    options: str, tmp_path: Path, authority: "trustme.CA", environment: pytest.MonkeyPatch
) -> None:
    """Certificates of either side, and a password for the key."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("h").private_key_and_cert_chain_pem.write_to_path(tmp_path / "own.pem")
    environment.setenv("REDIS_URL", f"rediss://h?{options.format(tmp_path)}")
    read(RelaySettings)


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("smtp://h", SmtpServer("h", 25, "none", None)),
        ("smtps://u:p%40%2F@h:1", SmtpServer("h", 1, "tls", "u", "p@/")),
        ("smtps://h", SmtpServer("h", 465, "tls", None)),
        (f"smtp+starttls://user:{SECRET}@mail", SmtpServer("mail", 587, "starttls", "user", SECRET)),
    ],
)
def test_the_url_of_the_mail_server_is_parsed(url: str, server: SmtpServer, environment: pytest.MonkeyPatch) -> None:
    """The scheme gives the encryption and the default port."""
    environment.setenv("SMTP_URL", url)
    assert WorkerSettings.from_environment().smtp_server == server
