"""Fixtures of several integration tests."""

import pytest

from outbox.cli.commands import outbox
from outbox.runtime import process
from tests.support import mailbox
from tests.support.dead_rows import Result, RunDead


@pytest.fixture(params=[True, False], ids=["pipelined", "one by one"])
def pipelining(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with mail servers that support pipelining and with servers that do not."""
    monkeypatch.setattr(mailbox, "PIPELINING", request.param)


@pytest.fixture
def run_dead(database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunDead:
    """Runs `outbox dead …` with its error handling and exit code, but inside the test process."""
    monkeypatch.setenv("DATABASE_URL", database_url)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            process.run(lambda: outbox.main(["dead", *map(str, arguments)], prog_name="outbox"))
        code = exited.value.code
        assert isinstance(code, int)
        return Result(code, *capsys.readouterr())

    return run
