"""How processes end when whoever set them up made a mistake: a sentence, an exit code, no traceback."""

import os
import subprocess
import sys

import psycopg
import pytest

from outbox import start
from outbox.errors import NotMigratedError, OutboxError, SettingsError

_GOOD = {
    "DATABASE_URL": "postgresql://outbox:hunter2@127.0.0.1:1/outbox",
    "REDIS_URL": "redis://:hunter2@127.0.0.1:1/0",
    "SMTP_URL": "smtp://127.0.0.1:1",
    "MAIL_FROM": "no-reply@example.com",
    "PUBLIC_URL": "http://127.0.0.1:8080",
    "SECRET_KEY": "hunter2" * 8,
}


def _run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "PYTHONPATH")}
    inherited |= {name: value for name, value in os.environ.items() if name.startswith("COV")}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "wrong", "sentence"),
    [
        (["relay"], {"DATABASE_URL": ""}, "DATABASE_URL is not set: set it to the Postgres database"),
        (["relay"], {"OUTBOX_BATCH": "hunter2"}, "OUTBOX_BATCH is wrong: "),
        (["worker"], {"SMTP_URL": "http://u:hunter2@host"}, "SMTP_URL is wrong: it must start with smtp://"),
        (["service"], {"HTTP_SERVER_ADDRESS": "hunter2"}, "HTTP_SERVER_ADDRESS is wrong: it must be host:port"),
        (["outbox", "migrate"], {"DATABASE_URL": "mysql://u:hunter2@host/db"}, "DATABASE_URL is wrong: it must start"),
    ],
)
def test_a_wrong_setting_ends_the_process(arguments: list[str], wrong: dict[str, str], sentence: str) -> None:
    """One sentence on stderr that names the variable, exit code 2, no traceback and no secret."""
    ended = _run(arguments, **{**_GOOD, **wrong})
    assert ended.returncode == 2
    assert ended.stderr.startswith(sentence)
    assert ended.stderr.count("\n") == 1
    assert "hunter2" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def test_migrate_without_postgres_is_a_sentence() -> None:
    """Where nobody answers, the command says so and fails; the password stays out."""
    ended = _run(["outbox", "migrate"], **_GOOD)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Postgres is away or refuses: ")
    assert "hunter2" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (SettingsError("A is wrong\nB is wrong"), 2, "A is wrong\nB is wrong\n"),
        (NotMigratedError("run 'outbox migrate'"), 1, "run 'outbox migrate'\n"),
        (OutboxError("no"), 1, "no\n"),
        (psycopg.OperationalError("a\nb"), 1, "Postgres is away or refuses: OperationalError: a b\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_every_mistake_has_its_exit_code(
    error: BaseException, code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 for settings, 1 for what a process cannot work with, 130 for Ctrl-C."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        start.run(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == sentence


def test_a_bug_is_a_traceback() -> None:
    """What is nobody's mistake but ours is not hidden behind a sentence."""
    with pytest.raises(ZeroDivisionError):
        start.run(lambda: 1 / 0)


def test_a_good_end_is_exit_code_0() -> None:
    """A process that is done just ends."""
    start.run(lambda: None)
