"""Warnings at the start of a process about passwords that may cross the network unencrypted."""

import pytest
from structlog.testing import capture_logs

from outbox.runtime.encryption import warn_about_plain_text
from outbox.runtime.endpoints import SmtpServer


@pytest.mark.parametrize(
    ("url", "is_warned"),
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
def test_postgres(url: str, *, is_warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns about another machine unless TLS is enforced, and never shows the password."""
    for name in ("PGSSLMODE", "PGHOST"):
        monkeypatch.delenv(name, raising=False)
    with capture_logs() as lines:
        warn_about_plain_text(url)
    assert [line["setting"] for line in lines] == ["DATABASE_URL"] * is_warned
    assert all("u:p" not in str(line) for line in lines)


def test_libpqs_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """PGSSLMODE and PGHOST fill what the URL leaves out."""
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
    ("url", "is_warned"),
    [
        ("redis://:secret@cache:6379/0", True),
        ("redis://cache:6379/0", False),
        ("rediss://:secret@cache:6379/0", False),
        ("redis://:secret@localhost:6379/0", False),
        ("unix://:secret@/run/redis.sock", False),
    ],
)
def test_redis(url: str, *, is_warned: bool) -> None:
    """Without a password there is nothing to protect: Redis holds only ids."""
    with capture_logs() as lines:
        warn_about_plain_text("postgresql:///outbox", redis_url=url)
    assert [line["setting"] for line in lines] == ["REDIS_URL"] * is_warned


@pytest.mark.parametrize(
    ("server", "is_warned"),
    [
        (SmtpServer("mail", 25, "none", "user", "secret"), True),
        (SmtpServer("mail", 25, "none", None), False),
        (SmtpServer("mail", 587, "starttls", "user", "secret"), False),
        (SmtpServer("127.0.0.1", 25, "none", "user", "secret"), False),
    ],
)
def test_the_mail_server(server: SmtpServer, *, is_warned: bool) -> None:
    """It warns if the password is sent in clear; smtp+starttls:// sends it only after TLS has started."""
    with capture_logs() as lines:
        warn_about_plain_text("postgresql:///outbox", smtp_server=server)
    assert [line["setting"] for line in lines] == ["SMTP_URL"] * is_warned
