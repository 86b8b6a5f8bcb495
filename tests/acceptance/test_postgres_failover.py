"""No process stays on the old primary after a fail-over of Postgres, even if it returns before the address moves."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from outbox.devstack.embedded import EmbeddedServer
from outbox.errors import NotMigratedError
from outbox.runtime import postgres, schema
from outbox.runtime.migrations import migrate
from outbox.runtime.settings import ServiceSettings
from outbox_worker.database import HandlerPool
from tests.conftest import short_folder
from tests.support.api import is_problem, serve
from tests.support.mailbox import Mailbox
from tests.support.processes import QUICK, Stack
from tests.support.standby import Pair, streaming_pair
from tests.support.waiting import eventually

pytestmark = pytest.mark.unmeasured


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """A migrated Postgres and its standby."""
    with short_folder() as folder, streaming_pair(folder) as servers:
        migrate(servers.primary.url)
        yield servers


@pytest.mark.parametrize("pooling", [False, True])
def test_the_service_leaves_the_standby(
    pair: Pair, service_settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch, *, pooling: bool
) -> None:
    """At a standby it is not ready; once the address points to the new primary, it creates users within seconds."""
    monkeypatch.setattr("outbox_service.pool.POOL_TIMEOUT", 0.5)
    pair.move_address()
    settings = service_settings.model_copy(update={"database_url": pair.url, "transaction_pooling": pooling})
    with serve(settings) as api:
        assert api.create(f"before_{pooling}".lower()).status_code == 201
        pair.fail_over()
        for _ in range(3):  # several times, so that the pool has had time to reconnect
            assert is_problem(api.client.get("/readyz"), 503)
        assert is_problem(api.create("during"), 503)
        pair.move_address()
        eventually(lambda: api.client.get("/readyz").status_code == 200, 20, "it is ready")
        assert api.create(f"after_{pooling}".lower()).status_code == 201
    (away,) = api.events("Postgres is away")
    assert "read-only" in away["error"] or "terminating connection" in away["error"]
    assert len(api.events("Postgres is back")) == 1


def test_a_server_that_turns_read_only(
    own_postgres: EmbeddedServer, service_settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sign-up refused for that gets 503, as `/readyz` does, and its session is closed; later sign-ups succeed."""
    monkeypatch.setattr("outbox_service.pool.POOL_TIMEOUT", 0.5)

    def sessions() -> set[int]:
        activity = "SELECT pid FROM pg_stat_activity WHERE application_name = 'outbox service'"
        return {pid for (pid,) in operator.execute(activity).fetchall()}

    with (
        serve(service_settings.model_copy(update={"database_url": own_postgres.url})) as api,
        psycopg.connect(own_postgres.url, autocommit=True) as operator,
    ):
        assert api.create("before").status_code == 201
        opened = sessions()
        operator.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        operator.execute("SELECT pg_reload_conf()")
        eventually(lambda: api.client.get("/readyz").status_code == 503, 10, "it is not ready")
        refused = api.create("refused")
        assert is_problem(refused, 503)
        assert refused.headers["Retry-After"] == "1"
        eventually(lambda: not sessions() & opened, 10, "the session has ended")
        operator.execute("SET default_transaction_read_only = off")
        operator.execute("ALTER SYSTEM RESET default_transaction_read_only")
        operator.execute("SELECT pg_reload_conf()")
        eventually(lambda: api.client.get("/readyz").status_code == 200, 20, "it is ready")
        assert api.create("after").status_code == 201
    (away,) = api.events("Postgres is away")
    assert "read-only" in away["error"]
    assert len(api.events("Postgres is back")) == 1


def test_a_sign_up_reports_that_postgres_is_read_only(service_settings: ServiceSettings, database_url: str) -> None:
    """A sign-up in a session that became read-only gets 503 with the reason."""
    with serve(service_settings) as api, psycopg.connect(database_url, autocommit=True) as operator:
        assert api.create("before").status_code == 201
        operator.execute(
            "CREATE FUNCTION freeze() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM set_config('transaction_read_only', 'on', true); RETURN NEW; END $$"
        )
        operator.execute("CREATE TRIGGER frozen BEFORE INSERT ON users EXECUTE FUNCTION freeze()")
        refused = api.create("refused")
    assert is_problem(refused, 503)
    assert refused.json()["detail"] == "the database is read-only: try again in a moment"


def test_a_read_only_session_is_not_reused_by_handlers(database_url: str) -> None:
    """Such a session may belong to a former primary, for example through a pooler."""
    with HandlerPool(database_url) as pool:
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction), pool.connection() as connection:
            connection.execute("SET TRANSACTION READ ONLY; DELETE FROM outbox")
        assert connection.closed
        with pool.connection() as another:
            another.execute("DELETE FROM outbox")


@pytest.mark.parametrize(("command", "code"), [("migrate", 1), ("dead list", 0)])
def test_commands_at_a_standby(pair: Pair, command: str, code: int) -> None:
    """A command that only reads works; one that writes reports that Postgres is read-only."""
    environment = {**os.environ, "DATABASE_URL": pair.standby.url}
    arguments = [sys.executable, "-m", "outbox", *command.split()]
    eventually(lambda: is_migrated(pair), 10, "the standby has caught up")
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, "Postgres is read-only" in result.stderr) == (code, code == 1)
    assert "Traceback" not in result.stderr


def is_migrated(pair: Pair) -> bool:
    """Whether the standby has replayed the migrations."""
    with postgres.connect(pair.standby.url, "test") as connection:
        try:
            schema.check_migrated(connection)
        except NotMigratedError:
            return False
        return True


@pytest.mark.parametrize("pooling", [False, True])
def test_handlers_leave_the_standby(pair: Pair, *, pooling: bool) -> None:
    """A worker's pool keeps no connection to the standby: the next handler writes to the new primary."""
    pair.move_address()
    with HandlerPool(pair.url, pooled=pooling) as pool:
        with pool.connection() as connection:
            connection.execute("DELETE FROM users")
        pair.fail_over()
        with pytest.raises(psycopg.OperationalError), pool.connection(timeout=0.5) as connection:
            connection.execute("SELECT 1")
        pair.move_address()
        with pool.connection() as connection:
            connection.execute("DELETE FROM users")


def test_several_hosts_in_the_url(pair: Pair, tmp_path: Path, redis_url: str, mailbox: Mailbox) -> None:
    """With both servers and target_session_attrs in the URL, all three processes switch to the new primary."""
    stack = Stack(tmp_path, pair.both_url, redis_url, mailbox.url)
    stack.environment |= QUICK
    stack.measured = False
    try:
        processes = stack.run_all("service", "relay", "worker")
        assert stack.create_user("first")[0] == 201
        eventually(lambda: mailbox.to("first@example.com"), 20, "a mail")
        pair.fail_over()
        eventually(lambda: stack.create_user("second")[0] == 201, 20, "a user")
        eventually(lambda: mailbox.to("second@example.com"), 20, "another mail")
        assert all(process.is_up() for process in processes)
    finally:
        stack.close()
