"""Errors of servers and libraries may quote secrets, which must reach neither the log nor a row."""

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from outbox.runtime.settings import ServiceSettings, WorkerSettings
from outbox_worker.mail_errors import MailServerError
from tests.conftest import Connection
from tests.support.api import Api, is_problem, serve
from tests.support.mailbox import serve_script
from tests.support.mailing import close, mail, mailer


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service with a database of the test's own."""
    with serve(service_settings) as served:
        yield served


REFUSALS = {
    "a trigger": """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'refused' USING DETAIL = 'the row: ' || NEW::text, HINT = NEW.hashed_password; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION refuse();
        """,
    "a constraint": "ALTER TABLE users ADD CONSTRAINT refuse CHECK (username <> 'alice')",
    "a view": """
        ALTER TABLE users RENAME TO all_users;
        CREATE VIEW users AS SELECT * FROM all_users WHERE username <> 'alice' WITH CHECK OPTION;
        """,
    "a partition": """
        DROP TABLE verify_emails;
        ALTER TABLE users RENAME TO all_users;
        CREATE TABLE users (LIKE all_users INCLUDING DEFAULTS) PARTITION BY LIST (username);
        """,
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_an_error_of_postgres_quotes_no_row(api: Api, connection: Connection, refusal: str) -> None:
    """The request fails, and neither the answer nor the log nor a traceback shows a part of the rejected row."""
    connection.execute(refusal.encode())

    answer = api.create()

    assert is_problem(answer, 500)
    log = api.log.getvalue()
    assert "request failed" in log
    for text in (answer.text, log):
        assert "argon2" not in text
        assert "alice@example.com" not in text


@pytest.mark.parametrize("code", [b"535 5.7.8", b"535", b"454 4.7.0", b"550 5.7.1"])
def test_a_login_that_is_quoted_is_not_repeated(code: bytes) -> None:
    """Of a reply to a login, only the codes are shown."""
    secret = base64.b64encode(b"\0user\0a-secret-password")
    quoting = {"EHLO": b"250-me\r\n250 AUTH PLAIN", "AUTH": code + b" what is AUTH PLAIN " + secret}
    with serve_script(replies=dict[str, bytes | None](quoting)) as server:
        sender = mailer(f"smtp://user:a-secret-password@127.0.0.1:{server.port}")
        with capture_logs() as lines, pytest.raises(MailServerError) as caught:
            sender.send(mail())
        close(sender)
    shown = f"{caught.value} {lines}"
    assert code.decode() in shown
    assert secret.decode() not in shown
    assert "a-secret-password" not in shown


@pytest.mark.parametrize("options", ["redis://:secr?et=x@h/0", "redis://h/0?secret=x", "redis://u:p?secret=1&y@h"])
def test_a_part_of_a_password_is_not_shown_as_an_option(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a question mark in a password, the rest looks like an option."""
    environment: dict[str, Any] = {
        "DATABASE_URL": "postgresql:///outbox",
        "REDIS_URL": options,
        "SECRET_KEY": "k" * 32,
        "SMTP_URL": "smtp://localhost",
        "MAIL_FROM": "a@example.com",
        "PUBLIC_URL": "https://example.com",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Exception, match="REDIS_URL") as caught:
        WorkerSettings.from_environment()
    assert "secr" not in str(caught.value)
    assert "et" not in str(caught.value).split()
