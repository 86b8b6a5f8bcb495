"""How processes end after a user's mistake: a sentence, an exit code, no traceback."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner

from outbox.cli.commands import outbox
from outbox.devstack import stack
from outbox.errors import NotMigratedError, OutboxError, SettingsError
from outbox.runtime import process


def _migrate(database_url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "outbox", "migrate"],
        env={**os.environ, "DATABASE_URL": database_url},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_wrong_setting_ends_a_command() -> None:
    """One sentence on stderr names the variable, the exit code is 2, and no secret is shown."""
    ended = _migrate("mysql://outbox:hunter2@host/db")
    assert ended.returncode == 2
    assert ended.stderr.startswith("DATABASE_URL is wrong: it must start")
    assert ended.stderr.count("\n") == 1
    assert "hunter2" not in ended.stdout + ended.stderr


def test_migrate_without_postgres_is_a_sentence() -> None:
    """If no server answers, the command says so and fails, without the password."""
    ended = _migrate("postgresql://outbox:hunter2@127.0.0.1:1/outbox")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Postgres is away or refuses: ")
    assert "hunter2" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def test_an_option_that_libpq_refuses_is_a_sentence() -> None:
    """The sentence quotes libpq, which names the option, and names the variable."""
    ended = _migrate("postgresql://outbox:hunter2@127.0.0.1:1/outbox?require_auth=magic")
    assert ended.returncode == 1
    assert "require_auth" in ended.stderr
    assert ended.stderr.endswith("(see DATABASE_URL)\n")
    assert "hunter2" not in ended.stdout + ended.stderr


def test_migrate_does_not_wait_for_a_silent_postgres() -> None:
    """If the server accepts the connection and never answers, the command gives up after seconds and says so."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ended = _migrate(f"postgresql://outbox@127.0.0.1:{silent.getsockname()[1]}/outbox")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Postgres is away or refuses: ConnectionTimeout: ")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (SettingsError("A is wrong\nB is wrong"), 2, "A is wrong\nB is wrong\n"),
        (NotMigratedError("run 'outbox migrate'"), 1, "run 'outbox migrate'\n"),
        (OutboxError("no"), 1, "no\n"),
        (
            psycopg.OperationalError("a\nb"),
            1,
            "Postgres is away or refuses: OperationalError: a b (see DATABASE_URL)\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_every_mistake_has_its_exit_code(
    error: BaseException, code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 for wrong settings, 1 for other errors, 130 for Ctrl-C."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        process.run(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == sentence


@pytest.mark.parametrize("module", ["service", "relay", "worker"])
def test_an_argument_is_a_mistake(module: str) -> None:
    """Only the environment configures a process; the sentence says so."""
    ended = subprocess.run(
        [sys.executable, "-m", "outbox", module, "--database-url=hunter2"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"outbox {module} takes no arguments: ")
    assert ended.stderr.count("\n") == 1
    assert "hunter2" not in ended.stdout + ended.stderr


def test_a_folder_needs_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty value, as of an unset shell variable, does not mean the current folder."""
    monkeypatch.chdir(tmp_path)
    started: list[Path] = []
    monkeypatch.setattr(stack, "run", started.append)
    ended = CliRunner().invoke(outbox, ["up", "--data", ""])
    assert (ended.exit_code, started) == (2, [])
    assert "empty" in ended.output
    assert CliRunner().invoke(outbox, ["up", "--data", "."]).exit_code == 0
    assert started == [Path()]


def test_a_bug_is_a_traceback() -> None:
    """A bug is not hidden behind a sentence."""
    with pytest.raises(ZeroDivisionError):
        process.run(lambda: 1 / 0)


def test_success_is_exit_code_0() -> None:
    """A process that has finished returns normally."""
    process.run(lambda: None)


def test_an_unread_sentence_does_not_block_the_exit() -> None:
    """If the pipe of stderr is full, the process still exits with its code."""
    code = (
        "import os; from outbox.runtime import process\n"
        "r, w = os.pipe(); os.dup2(w, 2); os.set_blocking(w, False)\n"
        "try:\n    while True: os.write(w, b'x' * 65536)\nexcept BlockingIOError: os.set_blocking(w, True)\n"
        "process.fail('never read', 3)"
    )
    begun = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 3
    assert time.monotonic() - begun < 20
