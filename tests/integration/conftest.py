"""Fixtures of several integration tests."""

from collections.abc import Callable, Iterator

import pytest

from outbox import Context
from outbox.cli.commands import outbox
from outbox.runtime import process
from outbox_worker.complete import Completer
from outbox_worker.in_flight import InFlight
from tests.support import mailbox
from tests.support.attempts import context_without_servers
from tests.support.dead_rows import Result, RunDead
from tests.support.processes import Stack


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


@pytest.fixture
def context() -> Context:
    """A context for handlers that need no server."""
    return context_without_servers()


@pytest.fixture
def completer(database_url: str) -> Iterator[Completer]:
    """A running completer of the worker `me`, with leases of one second."""
    completer = Completer(database_url, InFlight(), "me", 1)
    completer.start()
    yield completer
    completer.close(5)


@pytest.fixture
def noted_stack(stack: Stack) -> Stack:
    """A stack whose workers handle the task `noted`, with leases of one second."""
    stack.environment |= {"OUTBOX_HANDLERS": "tests.support.tasks", "OUTBOX_LEASE": "1"}
    return stack


@pytest.fixture
def empty_url(create_database: Callable[[str | None], str]) -> str:
    """A database without tables."""
    return create_database(None)


@pytest.fixture(scope="module")
def shared_url(create_database: Callable[[str | None], str], template: str) -> str:
    """A migrated database for all tests of a module."""
    return create_database(template)
