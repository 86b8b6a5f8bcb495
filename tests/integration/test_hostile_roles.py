"""Another role of the database server that has no right on our tables."""

import secrets
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import psycopg.sql
import pytest
import redis
from psycopg.conninfo import make_conninfo
from structlog.testing import capture_logs

from outbox.errors import LockedError, RightsError
from outbox.queries import query, sql_folder
from outbox.runtime import migrations, postgres, schema
from outbox.runtime.migrations import migrate
from outbox.runtime.settings import RelaySettings
from outbox.runtime.stop import Stop
from outbox_relay.loop import Relay
from outbox_relay.publish import publish
from outbox_relay.sweep import Sweep
from tests.conftest import Connection
from tests.support.waiting import eventually

Connect = Callable[[str], psycopg.Connection]


@pytest.fixture
def empty_url(empty_url: str) -> str:
    """A database without tables, in whose schema any role may create some, as by default in Postgres 14."""
    with psycopg.connect(empty_url) as connection:
        connection.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
    return empty_url


@pytest.fixture
def as_neighbour(empty_url: str) -> Iterator[Connect]:
    """Connects to a database as another role, which has no rights but on its own objects."""
    name = f"outbox_test_{secrets.token_hex(6)}"
    role = psycopg.sql.Identifier(name)
    opened: list[psycopg.Connection] = []

    def connect(url: str) -> psycopg.Connection:
        opened.append(psycopg.connect(make_conninfo(url, user=name, password="of a test"), autocommit=True))
        return opened[-1]

    with psycopg.connect(empty_url, autocommit=True) as owner:
        owner.execute(psycopg.sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'of a test'").format(role))
        yield connect
        for connection in opened:
            connection.close()
        owner.execute(psycopg.sql.SQL("DROP OWNED BY {}").format(role))
        owner.execute(psycopg.sql.SQL("DROP ROLE {}").format(role))


def _hold_advisory_locks(neighbour: psycopg.Connection) -> None:
    for name in ("outbox", "outbox sweep", "outbox migrate"):
        neighbour.execute("SELECT pg_advisory_lock(hashtext(%s))", [name])


def test_an_advisory_lock_does_not_block_the_sweep(
    connection: Connection,
    database_url: str,
    redis_client: redis.Redis,
    relay_settings: RelaySettings,
    as_neighbour: Connect,
) -> None:
    """After Redis was emptied, rows are swept although a neighbour holds every lock that earlier versions took."""
    _hold_advisory_locks(as_neighbour(database_url))
    settings = relay_settings.model_copy(update={"sweep_grace": 0.0})
    connection.execute("INSERT INTO outbox (task, payload) VALUES ('t', '{}')")
    assert publish(connection, redis_client, "default", settings) == 1
    redis_client.flushall()
    sweep = Sweep(redis_client, settings)
    sweep.step(connection)
    sweep.step(connection)
    assert connection.execute("SELECT status FROM outbox").fetchall() == [{"status": "pending"}]


def test_an_advisory_lock_does_not_block_a_migration(empty_url: str, as_neighbour: Connect) -> None:
    """The database is migrated although a neighbour holds these locks."""
    _hold_advisory_locks(as_neighbour(empty_url))
    with ThreadPoolExecutor(1) as threads:
        migrated = threads.submit(migrate, empty_url)
        try:
            assert migrated.result(20) == schema.migrations()
        except TimeoutError:
            with psycopg.connect(empty_url, autocommit=True) as owner:
                owner.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted")
            raise


def test_thousands_of_hints_take_no_memory(
    connection: Connection, database_url: str, relay_settings: RelaySettings, as_neighbour: Connect
) -> None:
    """Any role that may connect can send hints of 8 KB; the relay keeps only the fact that one arrived."""
    relay = Relay(relay_settings, Stop())
    relay._listen(connection)
    tracemalloc.start()
    try:
        as_neighbour(database_url).execute(
            "SELECT count(pg_notify('outbox', n || repeat('x', 7900))) FROM generate_series(1, 2000) AS n"
        )
        connection.execute("SELECT 1")
        assert relay._wait(connection, 5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000
    eventually(lambda: not relay._wait(connection, 0.1), 5, "all are received")


def test_no_statement_takes_an_advisory_lock() -> None:
    """Any role that may connect can hold one without limit."""
    for path in sql_folder().rglob("*.sql"):
        assert "pg_advisory" not in path.read_text(encoding="utf-8"), path.name


def test_the_lock_of_a_reader_does_not_block_a_migration(empty_url: str, as_neighbour: Connect) -> None:
    """A role that may read the records, as the roles of the processes may, cannot block a migration."""
    migrate(empty_url)
    with psycopg.connect(empty_url, autocommit=True) as owner:
        owner.execute("GRANT SELECT ON _yoyo_migration TO PUBLIC")
        owner.execute("DELETE FROM _yoyo_migration WHERE migration_id = %s", [schema.migrations()[-1]])
    neighbour = as_neighbour(empty_url)
    with neighbour.transaction(), ThreadPoolExecutor(1) as threads:
        neighbour.execute("LOCK TABLE _yoyo_migration IN ACCESS SHARE MODE")
        assert threads.submit(migrate, empty_url).result(20) == schema.migrations()[-1:]


PLANTED = [
    "CREATE TABLE _yoyo_migration (migration_hash text PRIMARY KEY, migration_id text, applied_at_utc timestamp)",
    "CREATE TABLE _yoyo_version (version integer, installed_at_utc timestamp)",
    "CREATE TABLE users (username varchar PRIMARY KEY)",
    "CREATE VIEW outbox AS SELECT 1 AS id",
    "CREATE VIEW verify_emails AS SELECT 1 AS id",
    "CREATE TABLE users_pkey (a integer)",
]


@pytest.mark.parametrize("statement", PLANTED)
def test_a_planted_table_is_refused(empty_url: str, as_neighbour: Connect, statement: str) -> None:
    """Its triggers would run with our rights, and it would hold what we write."""
    as_neighbour(empty_url).execute(statement.encode())
    name = statement.split()[2]
    with pytest.raises(RightsError, match=rf"{name} belongs to the role outbox_test_\w+") as caught:
        migrate(empty_url)
    assert "\n" not in str(caught.value)
    with psycopg.connect(empty_url) as connection:
        tables = connection.execute("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace")
        assert tables.fetchone() in [(1,), (2,)], "nothing was created except the planted table and its index"


@pytest.mark.parametrize("statement", PLANTED)
def test_a_neighbours_table_in_another_schema_is_ignored(empty_url: str, as_neighbour: Connect, statement: str) -> None:
    """Our tables are in the first schema of search_path; later schemas may be another application's."""
    as_neighbour(empty_url).execute(statement.encode())
    with psycopg.connect(empty_url) as connection:
        connection.execute("CREATE SCHEMA ours")
    url = make_conninfo(empty_url, options="-c search_path=ours,public")
    assert migrate(url) == schema.migrations()
    with postgres.connect(url, "test") as connection:
        schema.check_migrated(connection)


@pytest.mark.parametrize("statement", PLANTED[:2])
def test_a_table_planted_during_a_migration_is_refused(empty_url: str, as_neighbour: Connect, statement: str) -> None:
    """It is committed only when a migration waits for its name. None of its triggers runs."""
    neighbour = as_neighbour(empty_url)
    neighbour.execute("CREATE SEQUENCE fired")
    neighbour.execute("""
        CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM nextval('fired'); RETURN NEW; END $$
        """)
    neighbour.execute("GRANT ALL ON SEQUENCE fired TO PUBLIC")
    with ThreadPoolExecutor(1) as threads, psycopg.connect(empty_url, autocommit=True) as owner:
        with neighbour.transaction():
            neighbour.execute(statement.encode())
            table = statement.split()[2]
            neighbour.execute(f"CREATE TRIGGER fire BEFORE INSERT ON {table} EXECUTE FUNCTION fire()".encode())
            neighbour.execute(f"GRANT ALL ON {table} TO PUBLIC".encode())
            migrated = threads.submit(migrate, empty_url)
            waiting = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            eventually(lambda: owner.execute(waiting).fetchall(), 10, "the migration waits")
        with pytest.raises(RightsError, match="belongs to the role outbox_test_"):
            migrated.result(20)
        assert owner.execute("SELECT is_called FROM fired").fetchone() == (False,)


@pytest.mark.parametrize("statement", ["", *PLANTED[:1]])
def test_a_planted_schema_is_refused(empty_url: str, as_neighbour: Connect, statement: str) -> None:
    """A role that may create schemas can create the one that "$user" leads our role to, even an empty one."""
    neighbour = as_neighbour(empty_url)
    with psycopg.connect(empty_url, autocommit=True) as owner:
        user = psycopg.sql.Identifier(owner.info.user)
        database = psycopg.sql.Identifier(owner.info.dbname)
        owner.execute(psycopg.sql.SQL("GRANT CREATE ON DATABASE {} TO PUBLIC").format(database))
        neighbour.execute(psycopg.sql.SQL("CREATE SCHEMA {}").format(user))
        neighbour.execute(psycopg.sql.SQL("GRANT ALL ON SCHEMA {} TO PUBLIC").format(user))
        neighbour.execute(psycopg.sql.SQL("SET search_path TO {}").format(user))
        if statement:
            neighbour.execute(statement.encode())
        tables = "SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relnamespace = current_schema::regnamespace"
        before = owner.execute(tables).fetchone()
        with pytest.raises(RightsError, match=r"belongs to the role outbox_test_\w+") as caught:
            migrate(empty_url)
        assert "\n" not in str(caught.value)
        assert owner.execute(tables).fetchone() == before
        owner.execute(psycopg.sql.SQL("ALTER ROLE {} IN DATABASE {} SET search_path = public").format(user, database))
    assert migrate(empty_url) == schema.migrations(), "the remedy that the error names"


def test_a_member_of_the_owning_role_may_migrate(empty_url: str, as_neighbour: Connect) -> None:
    """So may a superuser, if the owning role owns the schema too."""
    owner = as_neighbour(empty_url).info.user
    schema_owner = psycopg.sql.SQL("ALTER SCHEMA public OWNER TO {}").format(psycopg.sql.Identifier(owner))
    member = f"{owner}_member"
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {member} LOGIN PASSWORD 'of a test' IN ROLE {owner}".encode())
        try:
            migrate(make_conninfo(empty_url, user=owner, password="of a test"))
            assert migrate(make_conninfo(empty_url, user=member, password="of a test")) == []
            with pytest.raises(RightsError, match=f"migrate as {owner}"):
                migrate(empty_url)
            connection.execute(schema_owner)
            assert migrate(empty_url) == []
        finally:
            connection.execute("ALTER SCHEMA public OWNER TO CURRENT_USER")
            connection.execute(f"DROP ROLE {member}".encode())


@pytest.mark.parametrize("statement", ["CREATE TABLE _yoyo_migration ()", "CREATE DOMAIN _yoyo_log AS int"])
def test_a_migration_gives_up_on_a_name_that_a_neighbour_holds(
    empty_url: str, as_neighbour: Connect, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    """A neighbour creates the name in a transaction that never ends: the migration says so and gives up."""
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT", 0.2)
    monkeypatch.setattr(migrations, "PAUSE", 0.0)
    neighbour = as_neighbour(empty_url)
    with neighbour.transaction(), capture_logs() as lines, ThreadPoolExecutor(1) as threads:
        neighbour.execute(statement.encode())
        migrated = threads.submit(migrate, empty_url)
        try:
            with pytest.raises(LockedError, match="pg_stat_activity"):
                migrated.result(20)
        finally:
            neighbour.execute("ROLLBACK")  # or the thread would never end
    assert {line["event"] for line in lines} == {"migration waits for a lock"}


def test_a_migration_logs_that_it_waits_for_another(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process may have died, and its server may not have ended the session yet."""
    monkeypatch.setattr(migrations, "PATIENCE", 0.1)
    migrate(empty_url)
    with psycopg.connect(empty_url) as other, capture_logs() as lines, ThreadPoolExecutor(1) as threads:
        other.execute("DELETE FROM _yoyo_migration WHERE migration_id = %s", [schema.migrations()[-1]])
        other.execute(query("lock_migrations"))
        migrated = threads.submit(migrate, empty_url)
        eventually(lambda: len(lines) >= 2, 10, "two lines")
        other.commit()
        assert migrated.result(20) == schema.migrations()[-1:]
    assert {line["event"] for line in lines[:2]} == {"migration waits for another process that migrates"}
