"""Fixtures for all tests."""

import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import psycopg.sql
import pytest
import redis

from outbox.devstack.embedded import EmbeddedServer, embedded_postgres, embedded_redis
from outbox.runtime import postgres, redis_connection
from outbox.runtime.migrations import migrate
from outbox.runtime.settings import RelaySettings, ServiceSettings, WorkerSettings
from tests.support import faked_clock
from tests.support.databases import Databases
from tests.support.mailbox import Mailbox, serve_mailbox
from tests.support.processes import SECRET_KEY, Stack
from tests.support.servers import postgres_choice, postgres_server, redis_choice, redis_server, with_database

if TYPE_CHECKING:
    import trustme

Connection = psycopg.Connection[dict[str, Any]]


def pytest_report_header() -> str:
    """Returns which servers the run uses."""
    return f"Postgres: {postgres_choice().description}; Redis: {redis_choice().description}"


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder for a server. In pytest's own, another run would revoke access for the user that runs Postgres."""
    with tempfile.TemporaryDirectory(prefix="outbox-test-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """The run's Postgres."""
    with short_folder() as folder, postgres_server(folder) as url:
        yield url


@pytest.fixture(scope="session")
def session_redis_url() -> Iterator[str]:
    """The run's Redis."""
    with short_folder() as folder, redis_server(folder) as url:
        yield url


@pytest.fixture(scope="session")
def create_database(server_url: str) -> Iterator[Callable[[str | None], str]]:
    """Creates a database from a template and returns its URL."""
    created: list[str] = []

    def execute(statement: str, *names: str) -> None:
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(psycopg.sql.SQL(statement).format(*map(psycopg.sql.Identifier, names)))

    def create(template: str | None = None) -> str:
        name = f"outbox_test_{secrets.token_hex(6)}"
        execute("CREATE DATABASE {} TEMPLATE {}", name, template or "template0")
        created.append(name)
        return with_database(server_url, name)

    yield create
    for name in created if postgres_choice().kind == "given" else ():  # other servers are deleted entirely
        execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)


@pytest.fixture(scope="module")
def file_postgres() -> Iterator[EmbeddedServer]:
    """A migrated Postgres for one test file, whose tests may stop it and change its settings if they undo that."""
    with short_folder() as folder, embedded_postgres(folder, settings=["fsync=off"]) as server:
        migrate(server.url)
        yield server


@pytest.fixture(scope="session", params=["LATIN1", "SQL_ASCII"])
def foreign_url(request: pytest.FixtureRequest, server_url: str) -> Iterator[str]:
    """A database whose encoding is not UTF-8."""
    name = f"outbox_test_{secrets.token_hex(6)}"
    database, encoding = psycopg.sql.Identifier(name), psycopg.sql.Literal(request.param)
    with psycopg.connect(server_url, autocommit=True) as connection:
        # The server's default provider may support no other encoding; Postgres 14 has only one provider.
        provider = "LOCALE_PROVIDER libc" if connection.info.server_version >= 150_000 else ""
        connection.execute(
            psycopg.sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING {} LOCALE 'C' {}").format(
                database, encoding, psycopg.sql.SQL(provider)
            )
        )
        yield with_database(server_url, name)
        connection.execute(psycopg.sql.SQL("DROP DATABASE {} WITH (FORCE)").format(database))


@pytest.fixture(scope="session")
def template(create_database: Callable[[str | None], str]) -> str:
    """The name of a migrated database to clone."""
    url = create_database(None)
    migrate(url)
    return url.partition("?")[0].rpartition("/")[2]


@pytest.fixture(scope="session")
def databases(create_database: Callable[[str | None], str], template: str) -> Databases:
    """Migrated, empty databases."""
    return Databases(create_database, template)


@pytest.fixture
def database_url(databases: Databases) -> Iterator[str]:
    """A migrated, empty database for one test."""
    url = databases.lend()
    yield url
    databases.take_back(url)


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    """A connection to the test's database, in autocommit mode; its rows are dictionaries."""
    with postgres.connect(database_url, "test") as opened:
        yield opened


@pytest.fixture
def redis_url(session_redis_url: str) -> str:
    """An emptied Redis."""
    with redis_connection.connect(session_redis_url, "test") as client:
        client.flushdb()
        client.delete("rq:suspended")
    return session_redis_url


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the emptied Redis."""
    with redis_connection.connect(redis_url, "test") as client:
        yield client


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    """A mail server."""
    with serve_mailbox() as served:
        yield served


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "trustme.CA":
    """A certificate authority that this process and its children trust during the test."""
    import trustme  # slow to import

    trusted = trustme.CA()
    trusted.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return trusted


@pytest.fixture
def stack(
    request: pytest.FixtureRequest, tmp_path: Path, database_url: str, redis_url: str, mailbox: Mailbox
) -> Iterator[Stack]:
    """A stack of the three processes, which the test starts."""
    opened = Stack(tmp_path, database_url, redis_url, mailbox.url)
    opened.measured = request.node.get_closest_marker("unmeasured") is None
    yield opened
    opened.close()


@pytest.fixture
def own_redis() -> Iterator[EmbeddedServer]:
    """A Redis for one test, which may stop, restart or break it."""
    with short_folder() as folder, embedded_redis(folder) as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[EmbeddedServer]:
    """A migrated Postgres for one test, which may stop and restart it."""
    with short_folder() as folder, embedded_postgres(folder, settings=["fsync=off"]) as server:
        migrate(server.url)
        yield server


@pytest.fixture
def clocked_postgres() -> Iterator[faked_clock.ClockedPostgres]:
    """A migrated Postgres for one test, which may set its clock."""
    if missing := faked_clock.why_missing():
        pytest.skip(missing)
    with short_folder() as folder, faked_clock.clocked_postgres(folder, settings=["fsync=off"]) as postgres:
        migrate(postgres.url)
        yield postgres


@pytest.fixture
def relay_settings(database_url: str, redis_url: str) -> RelaySettings:
    """Settings of a relay."""
    return RelaySettings(database_url=database_url, redis_url=redis_url)


@pytest.fixture
def service_settings(database_url: str) -> ServiceSettings:
    """Settings of a service without a delay before its mails."""
    return ServiceSettings(database_url=database_url, secret_key=SECRET_KEY, verify_email_delay=0)


@pytest.fixture
def worker_settings(database_url: str, redis_url: str, mailbox: Mailbox) -> WorkerSettings:
    """Settings of a worker."""
    return WorkerSettings.model_validate(
        {
            "database_url": database_url,
            "redis_url": redis_url,
            "smtp_server": mailbox.url,
            "mail_from": "Sign-up <no-reply@example.com>",
            "public_url": "http://127.0.0.1:8080",
            "secret_key": SECRET_KEY,
        }
    )
