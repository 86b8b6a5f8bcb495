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


def identified(client: redis.Redis, database_url: str) -> Installation:
    """Returns what a process of an installation announces."""
    made = Installation(client)
    with postgres.connect(database_url, "test") as connection:
        made.identify(connection)
    return made


@pytest.mark.parametrize("module", ["relay", "worker"])
def test_a_second_installation_does_not_start(
    module: str, stack: Stack, redis_client: redis.Redis, other_url: str
) -> None:
    """It ends with a sentence that says what to do; another process of the first starts."""
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


def test_an_installation_that_has_stopped_is_forgotten(
    redis_client: redis.Redis, database_url: str, other_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a Postgres that was restored elsewhere, or replaced, can use the same Redis, and nobody cleans up."""
    monkeypatch.setattr(installation, "LIFETIME", 1)
    identified(redis_client, database_url).announce()
    new = identified(redis_client, other_url)

    def starts() -> bool:
        try:
            new.announce()
        except SharedRedisError:
            return False
        return True

    assert not starts()
    eventually(starts, 5, "the first one's time is over")


def test_one_that_runs_goes_on(redis_client: redis.Redis, database_url: str, other_url: str) -> None:
    """An installation that got in beside another, as while Redis was emptied, ends no process: both say so, once."""
    first, second = identified(redis_client, database_url), identified(redis_client, other_url)
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
def test_a_key_that_no_installation_wrote_keeps_nobody_out(
    redis_client: redis.Redis, database_url: str, lifetime: int | None
) -> None:
    """Theirs runs out within LIFETIME. One that stays would have to be found and deleted before any process starts."""
    redis_client.set(installation.KEY, "x" * 1_000_000, ex=lifetime)
    identified(redis_client, database_url).announce()
    assert 0 < redis_client.ttl(installation.KEY) <= installation.LIFETIME


def test_what_another_installation_calls_itself_is_cut(redis_client: redis.Redis, database_url: str) -> None:
    """However much there is, little of it is read."""
    made = identified(redis_client, database_url)
    redis_client.set(installation.KEY, "x" * 1_000_000, ex=installation.LIFETIME)
    with pytest.raises(SharedRedisError) as raised:
        made.announce()
    assert len(str(raised.value)) < 1000


def test_a_process_that_connects_anew_is_the_same_installation(redis_client: redis.Redis, database_url: str) -> None:
    """Whatever session it has; after a restart of its process as well."""
    for _ in range(2):
        announced = identified(redis_client, database_url)
        announced.announce()
        announced.announce()
    assert 0 < redis_client.ttl(installation.KEY) <= installation.LIFETIME


def test_each_schema_has_an_installation_of_its_own(connection: Connection) -> None:
    """As each has its own outbox, whose ids come again in the other."""
    first = connection.execute(query("installation_id")).fetchone()
    connection.execute("CREATE SCHEMA other CREATE TABLE outbox ()")
    connection.execute("SET search_path = other")
    assert connection.execute(query("installation_id")).fetchone() != first


def test_where_postgres_does_not_say_which_it_is_nobody_is_refused(
    redis_client: redis.Redis, connection: Connection
) -> None:
    """A server that keeps its number to itself is served as ever."""
    redis_client.set(installation.KEY, "another")
    role = psycopg.sql.Identifier("outbox_test_without_rights")
    made = Installation(redis_client)
    with connection.transaction(force_rollback=True):
        connection.execute(psycopg.sql.SQL("CREATE ROLE {}").format(role))
        connection.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM public")
        connection.execute(psycopg.sql.SQL("SET LOCAL ROLE {}").format(role))
        made.identify(connection)
    made.announce()


def test_of_a_long_value_that_somebody_else_wrote_the_beginning_is_read(
    redis_client: redis.Redis, database_url: str
) -> None:
    """Before the start, in its sentence, and afterwards, in the log; neither the process nor the line gets long."""
    redis_client.set(installation.KEY, b"x" * 1_000_000, ex=installation.LIFETIME)
    with pytest.raises(SharedRedisError) as caught:
        identified(redis_client, database_url).announce()
    assert 200 < len(str(caught.value)) < 1000
    redis_client.delete(installation.KEY)
    running = identified(redis_client, database_url)
    running.announce()
    redis_client.set(installation.KEY, b"x" * 1_000_000, ex=installation.LIFETIME)
    with capture_logs() as lines:
        running.announce()
    (line,) = lines
    assert 200 < len(line["other"]) < 300
    running.announce()
    assert redis_client.strlen(installation.KEY) < 200
