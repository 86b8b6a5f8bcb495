"""A process that cannot start reports why in a sentence and exits; no process logs a secret."""

import secrets
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psycopg.sql
import pytest
from aiosmtpd.smtp import AuthResult

from outbox.devstack.embedded import EmbeddedServer, embedded_redis
from outbox.runtime import redis_connection
from tests.conftest import Connection
from tests.support.mailbox import link_in, serve_mailbox
from tests.support.processes import SECRET_KEY, Process, Stack
from tests.support.servers import cluster_settings
from tests.support.waiting import eventually

SECRET = "hunter2"

WRONG = [
    ("service", "SECRET_KEY", SECRET, "SECRET_KEY is wrong: "),
    ("service", "HTTP_SERVER_ADDRESS", "nowhere", "HTTP_SERVER_ADDRESS is wrong: it must be host:port"),
    ("relay", "DATABASE_URL", f"postgresql://me:{SECRET}@localhost/outbox?no_such_option=1", "DATABASE_URL is wrong: "),
    ("relay", "REDIS_URL", None, "REDIS_URL is not set: set it to "),
    *(
        (
            process,
            "REDIS_URL",
            f"rediss://:{SECRET}@h?ssl_min_version={SECRET}",
            "REDIS_URL is wrong: it has an ssl_min_version",
        )
        for process in ("relay", "worker")
    ),
    ("worker", "SMTP_URL", f"ftp://me:{SECRET}@localhost", "SMTP_URL is wrong: it must start with smtp://"),
    ("worker", "OUTBOX_HANDLERS", "no_such_module", "OUTBOX_HANDLERS is wrong: "),
]
"""Process, variable, value and start of the sentence. tests/unit/test_settings.py covers every variable."""


def sentence_of(process: Process) -> str:
    """Returns the only line that is not a log line, and asserts that no traceback and no secret was printed."""
    assert "Traceback" not in process.text()
    assert SECRET not in process.text()
    (sentence,) = (line for line in process.text().splitlines() if not line.startswith("{"))
    return sentence


@pytest.fixture(scope="module")
def started_wrong(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Process]]:
    """A process per wrong setting, all started at once."""
    stack = Stack(
        tmp_path_factory.mktemp("wrong"), "postgresql:///nowhere?host=/nonexistent", "unix:///nonexistent", "smtp://x"
    )
    good = dict(stack.environment)
    processes = []
    for module, variable, value, _ in WRONG:
        stack.environment = {name: text for name, text in good.items() if name != variable}
        processes.append(stack.start(module, **({} if value is None else {variable: value})))
    yield processes
    stack.close()


@pytest.mark.parametrize("case", range(len(WRONG)), ids=["-".join(filter(None, wrong[:2])) for wrong in WRONG])
def test_a_wrong_setting(started_wrong: list[Process], case: int) -> None:
    """A missing or wrong setting ends the process with a sentence that names it and exit code 2."""
    process = started_wrong[case]
    try:
        code = process.wait(30)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it still runs: {process.text()}")
    assert sentence_of(process).startswith(WRONG[case][3])
    assert code == 2


def test_a_database_that_is_not_migrated(
    tmp_path: Path, create_database: Callable[[str | None], str], redis_url: str
) -> None:
    """The sentence names the command to run."""
    stack = Stack(tmp_path, create_database(None), redis_url, "smtp://127.0.0.1:1")
    processes = [stack.start(module) for module in ("service", "relay", "worker")]
    assert [process.wait() for process in processes] == [1, 1, 1]
    assert all("outbox migrate" in sentence_of(process) for process in processes)


def test_a_database_that_is_not_in_utf8(tmp_path: Path, foreign_url: str, redis_url: str) -> None:
    """The sentence names the required encoding."""
    stack = Stack(tmp_path, foreign_url, redis_url, "smtp://127.0.0.1:1")
    processes = [stack.start(module) for module in ("service", "relay", "worker")]
    assert [process.wait() for process in processes] == [1, 1, 1]
    assert all("ENCODING 'UTF8'" in sentence_of(process) for process in processes)


def test_a_port_in_use(stack: Stack) -> None:
    """The sentence names the variable and the address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", stack.port))
        listener.listen()
        process = stack.start("service")
        assert process.wait() == 1
    sentence = sentence_of(process)
    assert "HTTP_SERVER_ADDRESS" in sentence
    assert f"127.0.0.1:{stack.port}" in sentence


def test_an_invalid_host_name(stack: Stack) -> None:
    """The sentence for a host name with an empty label names the variable."""
    process = stack.start("service", HTTP_SERVER_ADDRESS="a..b:8080")
    assert process.wait() in (1, 2)
    assert "HTTP_SERVER_ADDRESS" in sentence_of(process)


def test_a_redis_cluster(stack: Stack, tmp_path: Path) -> None:
    """Relay and worker refuse a Redis in cluster mode."""
    with embedded_redis(tmp_path / "cluster", settings=cluster_settings()) as server:
        processes = [stack.start(module, REDIS_URL=server.url) for module in ("relay", "worker")]
        assert [process.wait() for process in processes] == [1, 1]
    for process in processes:
        assert "cluster" in sentence_of(process)


@contextmanager
def login_role(connection: Connection, password: str) -> Iterator[str]:
    """Creates a role with the rights of the test's role, and yields its name."""
    name = f"outbox_test_{secrets.token_hex(6)}"
    role, test_role = psycopg.sql.Identifier(name), psycopg.sql.Identifier(connection.info.user)
    connection.execute(
        psycopg.sql.SQL("CREATE ROLE {} LOGIN PASSWORD {} IN ROLE {}").format(
            role, psycopg.sql.Literal(password), test_role
        )
    )
    try:
        yield name
    finally:
        connection.execute(psycopg.sql.SQL("DROP ROLE {}").format(role))


def test_no_log_holds_a_secret(stack: Stack, connection: Connection, own_redis: EmbeddedServer) -> None:
    """Even at `debug`, no log has a password, a hash, the secret key, the password of a URL or the code of a link."""
    hidden = {"user": "correct horse 1", "postgres": "pg-pass-2", "redis": "redis-pass-3", "smtp": "smtp-pass-4"}
    with redis_connection.connect(own_redis.url, "test") as client:
        client.config_set("requirepass", hidden["redis"])
    with (
        login_role(connection, hidden["postgres"]) as name,
        serve_mailbox(
            auth_require_tls=False, authenticator=lambda *_: AuthResult(success=True, handled=True)
        ) as mailbox,
    ):
        head, _, tail = stack.environment["DATABASE_URL"].partition("://")
        service, relay, worker = stack.run_all(
            "service",
            "relay",
            "worker",
            LOG_LEVEL="debug",
            DATABASE_URL=f"{head}://{name}:{hidden['postgres']}@{tail.partition('@')[2]}",
            REDIS_URL=own_redis.url.replace("unix://", f"unix://:{hidden['redis']}@"),
            SMTP_URL=mailbox.url.replace("//", f"//me:{hidden['smtp']}@"),
        )
        user = {"username": "alice", "password": hidden["user"], "full_name": "Alice", "email": "alice@example.com"}
        assert stack.post("/v1/users", {**user, "username": "A L I C E"})[0] == 400
        assert stack.post("/v1/users", {**user, "hashed_password": hidden["user"]})[0] == 400
        assert stack.post("/v1/users", user)[0] == 201
        assert stack.post("/v1/users", user)[0] == 409
        link = link_in(eventually(lambda: mailbox.to("alice@example.com"), 10, "the mail")[0])
        (code,) = parse_qs(urlsplit(link).query)["secret_code"]
        assert stack.get(link.removeprefix(stack.url))[0] == 200
        assert stack.get(link.removeprefix(stack.url))[0] == 410
        assert stack.get(link.removeprefix(stack.url)[:-1])[0] == 400
        worker.await_event("processed task")
        assert [process.stop() for process in (worker, relay, service)] == [0, 0, 0]

    row = connection.execute("SELECT hashed_password FROM users").fetchone()
    assert row is not None
    logged = "".join(process.text() for process in (service, relay, worker))
    assert logged.count('"event"') > 10, "the processes have logged"
    forbidden = [*hidden.values(), row["hashed_password"], row["hashed_password"][-20:], "argon2id", SECRET_KEY]
    assert [secret for secret in [*forbidden, code, code[:-1]] if secret in logged] == []
