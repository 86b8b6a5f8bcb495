"""Where a password may cross a network in clear, a process says so when it starts."""

import pytest
from structlog.testing import capture_logs

from outbox.runtime.encryption import warn_about_plain_text
from outbox.runtime.endpoints import SmtpServer


@pytest.mark.parametrize(
    ("url", "is_told"),
    [
        ("postgresql://u:p@db/outbox", True),
        ("postgresql://u:p@db/outbox?sslmode=prefer", True),
        ("postgresql://u:p@db/outbox?sslmode=allow", True),
        ("postgresql://u:p@db/outbox?sslmode=disable", True),
        ("postgresql://u:p@localhost,db/outbox", True),
        ("postgresql://u:p@192.0.2.1/outbox", True),
        ("postgresql:///outbox?hostaddr=192.0.2.1", True),
        ("postgresql://u:p@db/outbox?sslmode=require", False),
        ("postgresql://u:p@db/outbox?sslmode=verify-full", False),
        ("postgresql://u:p@localhost/outbox", False),
        ("postgresql://u:p@127.0.0.1,[::1]/outbox", False),
        ("postgresql:///outbox?host=/run/postgresql", False),
        ("postgresql:///outbox", False),
    ],
)
def test_postgres(url: str, *, is_told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine, unless no connection without TLS is made; whoever is asked, the password is not said."""
    for name in ("PGSSLMODE", "PGHOST"):
        monkeypatch.delenv(name, raising=False)
    with capture_logs() as lines:
        warn_about_plain_text(url)
    assert [line["setting"] for line in lines] == ["DATABASE_URL"] * is_told
    assert all("u:p" not in str(line) for line in lines)


def test_what_the_environment_says_of_postgres(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads it, so it counts."""
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    with capture_logs() as lines:
        warn_about_plain_text("postgresql://u:p@db/outbox")
    assert lines == []
    monkeypatch.delenv("PGSSLMODE")
    monkeypatch.setenv("PGHOST", "db")
    with capture_logs() as lines:
        warn_about_plain_text("postgresql:///outbox")
    assert [line["event"] for line in lines] == ["connection may be unencrypted"]


@pytest.mark.parametrize(
    ("url", "is_told"),
    [
        ("redis://:secret@cache:6379/0", True),
        ("redis://cache:6379/0", False),
        ("rediss://:secret@cache:6379/0", False),
        ("redis://:secret@localhost:6379/0", False),
        ("unix://:secret@/run/redis.sock", False),
    ],
)
def test_redis(url: str, *, is_told: bool) -> None:
    """Without a password there is nothing to read: Redis holds ids alone."""
    with capture_logs() as lines:
        warn_about_plain_text("postgresql:///outbox", redis_url=url)
    assert [line["setting"] for line in lines] == ["REDIS_URL"] * is_told


@pytest.mark.parametrize(
    ("server", "is_told"),
    [
        (SmtpServer("mail", 25, "none", "user", "secret"), True),
        (SmtpServer("mail", 25, "none", None), False),
        (SmtpServer("mail", 587, "starttls", "user", "secret"), False),
        (SmtpServer("127.0.0.1", 25, "none", "user", "secret"), False),
    ],
)
def test_the_mail_server(server: SmtpServer, *, is_told: bool) -> None:
    """Where it is told the password; smtp+starttls:// sends none before TLS."""
    with capture_logs() as lines:
        warn_about_plain_text("postgresql:///outbox", smtp_server=server)
    assert [line["setting"] for line in lines] == ["SMTP_URL"] * is_told
