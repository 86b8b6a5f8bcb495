"""Probes, and the answers of the service while Postgres is away or unusable."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import psycopg
import psycopg.sql
import pytest
from psycopg_pool.base import AttemptWithBackoff

from outbox.devstack.embedded import EmbeddedServer
from outbox.runtime import postgres
from outbox.runtime.settings import ServiceSettings
from outbox_service import pool
from tests.support.api import PASSWORD, Api, is_problem, serve
from tests.support.processes import frozen
from tests.support.waiting import eventually

Outage = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def api(service_settings: ServiceSettings) -> Iterator[Api]:
    """A service with a database of its own."""
    with serve(service_settings) as served:
        yield served


@pytest.fixture
def outage(server_url: str, database_url: str) -> Outage:
    """Refuses and ends all connections to the test's database until the block ends."""
    name = database_url.partition("?")[0].rpartition("/")[2]
    change = psycopg.sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")

    @contextmanager
    def away() -> Iterator[None]:
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(change.format(psycopg.sql.Identifier(name), psycopg.sql.Literal("false")))
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            try:
                yield
            finally:
                connection.execute(change.format(psycopg.sql.Identifier(name), psycopg.sql.Literal("true")))

    return away


def test_a_healthy_service_is_alive_and_ready(api: Api) -> None:
    """Both probes answer 200 with a status if only Postgres runs."""
    assert (api.client.get("/healthz").status_code, api.client.get("/healthz").json()) == (200, {"status": "ok"})
    assert (api.client.get("/readyz").status_code, api.client.get("/readyz").json()) == (200, {"status": "ready"})


def test_without_postgres_the_service_is_alive_but_not_ready(
    service_settings: ServiceSettings,
    outage: Outage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While Postgres is away, requests get 503 problems with Retry-After; afterwards, users can be created again."""
    monkeypatch.setattr(pool, "POOL_TIMEOUT", 0.3)
    with serve(service_settings) as api:
        assert api.create("before").status_code == 201

        with outage():
            refused, ready, alive = api.create("while"), api.client.get("/readyz"), api.client.get("/healthz")

        assert is_problem(refused, 503)
        assert is_problem(ready, 503)
        assert int(refused.headers["retry-after"]) > 0
        assert int(ready.headers["retry-after"]) > 0
        assert alive.status_code == 200
        assert PASSWORD not in api.log.getvalue()
        eventually(lambda: api.create("after").status_code == 201, 5, "the service recovers")


def test_the_service_is_back_soon_after_a_long_outage(
    service_settings: ServiceSettings,
    outage: Outage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After an outage of any length, users can be created within seconds."""
    # Simulates a long outage: the pool's second wait is as long as its backoff after two minutes.
    monkeypatch.setattr(AttemptWithBackoff, "DELAY_BACKOFF", 60)
    monkeypatch.setattr(pool, "POOL_TIMEOUT", 0.3)
    with serve(service_settings) as api:
        with outage():
            tries = [api.create("while").status_code for _ in range(6)]

        assert tries == [503] * 6
        eventually(lambda: api.create("after").status_code == 201, 4, "the service recovers")


def test_a_hanging_postgres_delays_no_request_for_long(
    service_settings: ServiceSettings, own_postgres: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests in flight and new ones get 503 if Postgres keeps its connections open and does not answer."""
    monkeypatch.setattr(postgres, "ANSWER_LIMIT", 0.5)
    monkeypatch.setattr(pool, "POOL_TIMEOUT", 0.3)
    with serve(service_settings.model_copy(update={"database_url": own_postgres.url})) as api:
        assert api.create("before").status_code == 201

        with frozen(own_postgres):
            refused, ready, alive = api.create("while"), api.client.get("/readyz"), api.client.get("/healthz")

        assert is_problem(refused, 503)
        assert is_problem(ready, 503)
        assert alive.status_code == 200
        eventually(lambda: api.create("after").status_code in (201, 409), 10, "the service recovers")


def test_a_browser_gets_a_page_when_postgres_is_away(
    service_settings: ServiceSettings,
    outage: Outage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A link that is opened in a browser during an outage returns a page that says so, with 503 and Retry-After."""
    monkeypatch.setattr(pool, "POOL_TIMEOUT", 0.1)
    with serve(service_settings) as api, outage():
        link = "/v1/verify_email?email_id=1&secret_code=abc"
        response = api.client.get(link, headers={"Accept": "text/html"})

    assert response.status_code == 503
    assert response.headers["content-type"].startswith("text/html")
    assert "The database is unavailable" in response.text
    assert "retry-after" in response.headers


def test_a_database_that_is_not_migrated_is_not_ready(create_database: Callable[[str | None], str]) -> None:
    """The readiness probe and sign-ups answer 503 with a sentence that names the command."""
    settings = ServiceSettings(database_url=create_database(None), secret_key="k" * 32)
    with serve(settings) as api:
        for response in (api.client.get("/readyz"), api.create()):
            assert is_problem(response, 503)
            assert "not migrated" in response.json()["detail"]
            assert "run 'outbox migrate'" in response.json()["detail"]


def test_a_database_that_is_not_in_utf8_is_not_ready(foreign_url: str) -> None:
    """If Postgres was away when the service started, the readiness probe reports the encoding."""
    with serve(ServiceSettings(database_url=foreign_url, secret_key="k" * 32)) as api:
        response = api.client.get("/readyz")
    assert is_problem(response, 503)
    assert "ENCODING 'UTF8'" in response.json()["detail"]
