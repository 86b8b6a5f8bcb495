"""Two installations on one Redis database: the second does not start, and the first goes on."""

from collections.abc import Iterator

import psycopg
import pytest
import redis
from structlog.testing import capture_logs

from outbox.errors import SharedRedisError
from outbox.queries import query
from outbox.runtime import installation, postgres
from outbox.runtime.installation import Installation
from tests.conftest import Connection
from tests.support.databases import Databases
from tests.support.processes import Stack
from tests.support.waiting import eventually


@pytest.fixture
def other_url(databases: Databases) -> Iterator[str]:
    """The database of another installation."""
    url = databases.lend()
    yield url
    databases.take_back(url)


def identify(client: redis.Redis, database_url: str) -> Installation:
    """Returns the installation of a database, as one of its processes announces it."""
    identified = Installation(client)
    with postgres.connect(database_url, "test") as connection:
        identified.identify(connection)
    return identified


@pytest.mark.parametrize("module", ["relay", "worker"])
def test_a_second_installation_does_not_start(
    module: str, stack: Stack, redis_client: redis.Redis, other_url: str
) -> None:
    """It exits with a sentence that says what to do; another process of the first one starts."""
    first = stack.run("relay")
    eventually(lambda: redis_client.get(installation.KEY), 10, "it is announced")

    second = stack.start(module, DATABASE_URL=other_url)
    assert second.wait(20) == 1
    assert "give each one of its own, as in redis://host:6379/3" in second.text()
    assert "Traceback" not in second.text()

    third = stack.run(module)
    eventually(lambda: redis_client.smembers("rq:workers") if module == "worker" else third.is_up(), 10)
    assert [process.stop() for process in (first, third)] == [0, 0]
    assert not first.events("another installation uses this Redis database")


def test_the_announcement_of_a_stopped_installation_expires(
    redis_client: redis.Redis, database_url: str, other_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a Postgres that was restored elsewhere, or replaced, can use the same Redis without a clean-up."""
    monkeypatch.setattr(installation, "LIFETIME", 1)
    identify(redis_client, database_url).announce()
    new = identify(redis_client, other_url)

    def starts() -> bool:
        try:
            new.announce()
        except SharedRedisError:
            return False
        return True

    assert not starts()
    eventually(starts, 5, "the first one's time is over")


def test_a_running_installation_goes_on(redis_client: redis.Redis, database_url: str, other_url: str) -> None:
    """If a second installation gets in, because Redis was emptied, both log it once and no process ends."""
    first, second = identify(redis_client, database_url), identify(redis_client, other_url)
    first.announce()
    redis_client.flushdb()
    second.announce()
    with capture_logs() as lines:
        for _ in range(3):
            first.announce()
            second.announce()
    names = [line["event"] for line in lines]
    assert names == ["another installation uses this Redis database"] * 2
    assert lines[0]["own"].encode() in lines[1]["other"].encode()
    assert "REDIS_URL" in lines[0]["remedy"]


@pytest.mark.parametrize("lifetime", [None, 3600])
def test_a_key_of_another_client_does_not_prevent_a_start(
    redis_client: redis.Redis, database_url: str, lifetime: int | None
) -> None:
    """An installation's key expires within LIFETIME. Any other key must not prevent a start."""
    redis_client.set(installation.KEY, "x" * 1_000_000, ex=lifetime)
    identify(redis_client, database_url).announce()
    assert 0 < redis_client.ttl(installation.KEY) <= installation.LIFETIME


def test_a_process_that_reconnects_is_the_same_installation(redis_client: redis.Redis, database_url: str) -> None:
    """Also after a restart of the process."""
    for _ in range(2):
        announced = identify(redis_client, database_url)
        announced.announce()
        announced.announce()
    assert 0 < redis_client.ttl(installation.KEY) <= installation.LIFETIME


def test_each_schema_has_an_installation_of_its_own(connection: Connection) -> None:
    """Each schema has its own outbox, with the same ids."""
    first = connection.execute(query("installation_id")).fetchone()
    connection.execute("CREATE SCHEMA other CREATE TABLE outbox ()")
    connection.execute("SET search_path = other")
    assert connection.execute(query("installation_id")).fetchone() != first


def test_without_an_id_from_postgres_no_process_is_refused(redis_client: redis.Redis, connection: Connection) -> None:
    """A role may lack the right to read the server's identifier."""
    redis_client.set(installation.KEY, "another")
    role = psycopg.sql.Identifier("outbox_test_without_rights")
    own = Installation(redis_client)
    with connection.transaction(force_rollback=True):
        connection.execute(psycopg.sql.SQL("CREATE ROLE {}").format(role))
        connection.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM public")
        connection.execute(psycopg.sql.SQL("SET LOCAL ROLE {}").format(role))
        own.identify(connection)
    own.announce()


def test_a_long_foreign_value_is_cut(redis_client: redis.Redis, database_url: str) -> None:
    """In the sentence at the start, and later in the log."""
    redis_client.set(installation.KEY, b"x" * 1_000_000, ex=installation.LIFETIME)
    with pytest.raises(SharedRedisError) as caught:
        identify(redis_client, database_url).announce()
    assert 200 < len(str(caught.value)) < 1000
    redis_client.delete(installation.KEY)
    running = identify(redis_client, database_url)
    running.announce()
    redis_client.set(installation.KEY, b"x" * 1_000_000, ex=installation.LIFETIME)
    with capture_logs() as lines:
        running.announce()
    (line,) = lines
    assert 200 < len(line["other"]) < 300
    running.announce()
    assert redis_client.strlen(installation.KEY) < 200
