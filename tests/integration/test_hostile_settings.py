"""Databases with settings that change what statements do, or how long they may take."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import LiteralString

import psycopg
import psycopg.sql
import pytest
import redis
from psycopg.conninfo import conninfo_to_dict
from structlog.testing import capture_logs

from outbox import Context
from outbox.cli import dead_letters
from outbox.row import Status
from outbox.rq_jobs import Delivery
from outbox.runtime import pooler, postgres, schema
from outbox.runtime.migrations import migrate
from outbox.runtime.outage import Outage
from outbox.runtime.settings import RelaySettings, ServiceSettings, WorkerSettings
from outbox_relay.publish import publish
from outbox_service.pool import create_pool
from outbox_worker.attempt import attempt
from outbox_worker.claim import claim
from outbox_worker.complete import Completer
from outbox_worker.database import HandlerPool
from outbox_worker.handlers import registry
from outbox_worker.in_flight import InFlight
from outbox_worker.mail import Mailer
from outbox_worker.outcome import Outcome
from tests.conftest import Connection
from tests.support.api import Api, is_problem, serve
from tests.support.mailbox import Mailbox, link_in
from tests.support.session_settings import set_for_database

pytestmark = pytest.mark.once

HOSTILE = [
    ("DateStyle", "German, DMY"),
    ("DateStyle", "SQL, MDY"),
    ("DateStyle", "Postgres, DMY"),
    ("TimeZone", "Asia/Kolkata"),
    ("TimeZone", "<+09>-9"),
    ("IntervalStyle", "sql_standard"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_isolation", "repeatable read"),
    ("default_transaction_deferrable", "on"),
    ("idle_session_timeout", "100ms"),
    ("idle_in_transaction_session_timeout", "100ms"),
    ("lock_timeout", "10ms"),
    ("statement_timeout", "100ms"),
    ("transaction_timeout", "100ms"),
    ("row_security", "off"),
    ("bytea_output", "escape"),
    ("standard_conforming_strings", "off"),
    ("jit_above_cost", "0"),
    ("plan_cache_mode", "force_generic_plan"),
    ("extra_float_digits", "-15"),
    ("array_nulls", "off"),
    ("transform_null_equals", "on"),
    ("quote_all_identifiers", "on"),
    ("exit_on_error", "on"),
    ("synchronous_commit", "off"),
]
"""Settings that a database, a role or the environment may have, with values that another application may need."""


@pytest.fixture(params=HOSTILE, ids=lambda setting: f"{setting[0]}={setting[1]}")
def hostile_url(shared_url: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """A migrated database whose new sessions start with one hostile setting."""
    with set_for_database(shared_url, *request.param):
        yield shared_url


@pytest.fixture
def api(hostile_url: str, service_settings: ServiceSettings) -> Iterator[Api]:
    """A service on that database."""
    with serve(service_settings.model_copy(update={"database_url": hostile_url})) as served:
        yield served


def test_a_user_signs_up_and_verifies(  # noqa: PLR0917 - fixtures
    hostile_url: str,
    api: Api,
    redis_client: redis.Redis,
    relay_settings: RelaySettings,
    worker_settings: WorkerSettings,
    mailbox: Mailbox,
) -> None:
    """With each setting, sign-up, hand-over, claim, mail, completion and verification work, with times in UTC."""
    with postgres.connect(hostile_url, "test") as connection:
        connection.execute("DELETE FROM outbox")
        connection.execute("DELETE FROM users")
        created = api.create("alice")
        assert created.status_code == 201
        assert is_now(created.json()["user"]["created_at"])
        assert is_problem(api.create("alice"), 409)

        assert publish(connection, redis_client, "critical", relay_settings) == 1
        (row,) = connection.execute("SELECT id, extract(epoch FROM now())::float8 AS now FROM outbox").fetchall()
        assert abs(row["now"] - time.time()) < 60
        (claimed,) = claim(connection, [Delivery(row["id"], 1)], "me", 15)
        mailer = Mailer(worker_settings)
        with HandlerPool(hostile_url) as pool:
            context = Context(
                row_id=row["id"],
                attempt=1,
                deadline=time.monotonic() + 60,
                database=pool,
                send=mailer.send,
            )
            outcome = attempt(claimed, registry(worker_settings), context, 3600).outcome
        mailer.close_idle(0)
        assert outcome == Outcome(claimed.delivery, Status.DONE, 1)
        completer = Completer(hostile_url, InFlight(), "me", 15)
        completer.in_flight.hold([claimed])
        completer.start()
        completer.in_flight.put(outcome)
        assert completer.close(20) == []
        assert connection.execute("SELECT status, last_error FROM outbox").fetchall() == [
            {"status": "done", "last_error": None}
        ]
        link = link_in(mailbox.to("alice@example.com")[0]).partition("/v1/")[2]
        assert api.client.get(f"/v1/{link}", headers={"Accept": "application/json"}).json() == {"is_verified": True}


def is_now(text: str) -> bool:
    """Returns whether an ISO time is in UTC and close to the present."""
    return text.endswith("Z") and abs(datetime.fromisoformat(text) - datetime.now(UTC)) < timedelta(minutes=1)


def test_an_operator_reads_times_in_utc(hostile_url: str) -> None:
    """In JSON and in text, also behind a pooler, whose sessions cannot get settings."""
    for pooled in (False, True):
        with postgres.connect(hostile_url, "test", pooled=pooled) as connection:
            (row,) = connection.execute(
                "INSERT INTO outbox (task, payload, status) VALUES ('t', '{}', 'dead') RETURNING id"
            ).fetchall()
            row_shown = dead_letters.read(connection, row["id"])
            (document,) = dead_letters.newest_json(connection, "t", 1)
            dead_letters.discard(connection, [row["id"]])
        assert row_shown is not None
        assert abs(datetime.fromisoformat(row_shown.created_at) - datetime.now(UTC)) < timedelta(minutes=1)
        assert row_shown.created_at.endswith("+00")
        assert json.loads(document)["created_at"].endswith("+00:00")


def test_a_sign_up_behind_a_pooler(hostile_url: str, service_settings: ServiceSettings) -> None:
    """Sessions of a pooler cannot get settings, and the answer does not depend on them."""
    pooled = service_settings.model_copy(update={"database_url": hostile_url, "transaction_pooling": True})
    with serve(pooled) as api:
        with psycopg.connect(hostile_url, autocommit=True) as connection:
            connection.execute("DELETE FROM users")
        created = api.create("alice")
    assert created.status_code == 201
    assert is_now(created.json()["user"]["created_at"])


LIMITS = {
    "idle_in_transaction_session_timeout": "30s",
    "idle_session_timeout": "0",
    "lock_timeout": "10s",
    "statement_timeout": "30s",
    "transaction_timeout": "0",
}
"""The time limits of our sessions."""


@pytest.mark.parametrize("name", LIMITS)
def test_the_limits_of_a_session_are_ours(
    shared_url: str, service_settings: ServiceSettings, name: LiteralString
) -> None:
    """They override the role's limits, in the service as well as in relay and worker."""
    show: LiteralString = f"SHOW {name}"

    async def lent() -> object:
        settings = service_settings.model_copy(update={"database_url": shared_url})
        async with create_pool(settings, Outage("Postgres")) as pool, pool.connection() as connection:
            return await (await connection.execute(show)).fetchone()

    with set_for_database(shared_url, name, "123s"):
        with postgres.connect(shared_url, "test") as connection:
            assert connection.execute(show).fetchone() == {name: LIMITS[name]}
        assert asyncio.run(lent()) == {name: LIMITS[name]}


def test_libpqs_variables_do_not_change_sessions(shared_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PGOPTIONS and the like are meant for other programs."""
    monkeypatch.setenv("PGDATESTYLE", "German")
    monkeypatch.setenv("PGTZ", "Asia/Kolkata")
    monkeypatch.setenv("PGOPTIONS", "-c default_transaction_isolation=serializable -c statement_timeout=1h")
    with postgres.connect(shared_url, "test") as connection:
        row = connection.execute(
            "SELECT current_setting('DateStyle') AS style, current_setting('TimeZone') AS zone,"
            " current_setting('transaction_isolation') AS isolation, current_setting('statement_timeout') AS timeout"
        ).fetchone()
    assert row == {"style": "ISO, DMY", "zone": "UTC", "isolation": "read committed", "timeout": "30s"}


@pytest.mark.parametrize(
    ("name", "hostile", "good"),
    [
        ("lock_timeout", "0", "10s"),
        ("transaction_timeout", "5s", "0"),
        ("default_transaction_isolation", "serializable", "read committed"),
        ("extra_float_digits", "-15", "1"),
        ("array_nulls", "off", "on"),
        ("synchronous_commit", "off", "on"),
    ],
)
def test_settings_that_pooled_sessions_lack_are_logged(shared_url: str, name: str, hostile: str, good: str) -> None:
    """The warning has the statement that gives the role a setting that our code relies on."""
    with (
        set_for_database(shared_url, name, hostile),
        postgres.connect(shared_url, "test", pooled=True) as connection,
        capture_logs() as lines,
    ):
        pooler.warn_about_missing_settings(connection)
        (row,) = connection.execute("SELECT quote_ident(session_user) AS role").fetchall()
    (line,) = lines
    assert line["event"] == "sessions lack settings"
    assert f"ALTER ROLE {row['role']} SET {name} = '{good}'" in line["run"].split("; ")


def test_a_transaction_that_took_too_long_is_an_outage(connection: Connection, database_url: str) -> None:
    """Behind a pooler, the role may have such a limit: the statement is tried again, and no process ends."""
    if connection.info.server_version < 170_000:
        pytest.skip("this Postgres has no transaction_timeout")
    with postgres.connect(database_url, "test", pooled=True) as limited:
        limited.execute("SET transaction_timeout = '50ms'")
        with pytest.raises(postgres.AWAY) as caught, limited.transaction():
            limited.execute("SELECT pg_sleep(10)")
    assert postgres.is_outage(caught.value)


@pytest.mark.parametrize("tenant", ["tenant", 'A "Tenant"'])
def test_search_path_chooses_the_schema(
    create_database: Callable[[str | None], str], service_settings: ServiceSettings, tenant: str
) -> None:
    """It is not changed: the schema that it names first gets the tables, and `public` none."""
    url = create_database(None)
    name = psycopg.sql.Identifier(tenant)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(psycopg.sql.SQL("CREATE SCHEMA {}").format(name))
        database = psycopg.sql.Identifier(str(conninfo_to_dict(url)["dbname"]))
        connection.execute(psycopg.sql.SQL("ALTER DATABASE {} SET search_path = {}, public").format(database, name))
    assert migrate(url) == schema.migrations()
    assert migrate(url) == []
    with serve(service_settings.model_copy(update={"database_url": url})) as api:
        assert api.create("alice").status_code == 201
        assert api.client.get("/readyz").status_code == 200
    with psycopg.connect(url) as connection:
        assert connection.execute(psycopg.sql.SQL("SELECT task FROM {}.outbox").format(name)).fetchall() == [
            ("send_verify_email",)
        ]
        assert connection.execute("SELECT FROM pg_tables WHERE schemaname = 'public'").fetchall() == []


@pytest.mark.parametrize(("name", "value"), HOSTILE)
def test_a_database_is_migrated(create_database: Callable[[str | None], str], name: str, value: str) -> None:
    """With each setting, migrations are applied once."""
    url = create_database(None)
    with set_for_database(url, name, value):
        assert migrate(url) == schema.migrations()
        assert migrate(url) == []
