"""Postgres stops and comes back: the service reports it, and nothing that it acknowledged is lost."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from outbox.devstack.embedded import EmbeddedServer
from outbox.runtime import postgres
from tests.support.mailbox import Mailbox
from tests.support.processes import QUICK, Stack, add_users, take_down
from tests.support.waiting import eventually

pytestmark = pytest.mark.unmeasured

RECOVERY = 3.0
"""Seconds within which the service must be ready once Postgres accepts connections."""


@pytest.fixture
def stack(tmp_path: Path, own_postgres: EmbeddedServer, redis_url: str, mailbox: Mailbox) -> Iterator[Stack]:
    """A stack on a Postgres of its own."""
    opened = Stack(tmp_path, own_postgres.url, redis_url, mailbox.url)
    opened.environment |= QUICK
    yield opened
    opened.close()


def user(name: str) -> dict[str, str]:
    """Returns a body for POST /v1/users."""
    return {"username": name, "password": "correct horse", "full_name": "A User", "email": f"{name}@example.com"}


def is_accepting(server: EmbeddedServer) -> bool:
    """Whether Postgres accepts connections."""
    try:
        postgres.connect(server.url, "test").close()
    except postgres.AWAY:
        return False
    return True


def test_postgres_stopped_and_back(stack: Stack, own_postgres: EmbeddedServer, mailbox: Mailbox) -> None:
    """During the outage the service answers 503 with Retry-After and is not ready; relay and worker log it once.

    After it, the service creates users within seconds. Every user created before or after the outage gets one mail; a
    request that got 503 left nothing behind.
    """
    service, relay, worker = stack.run_all("service", "relay", "worker")
    names = [f"before_{n}" for n in range(20)]
    with postgres.connect(own_postgres.url, "test") as connection:
        add_users(connection, names, delay=1)
    with httpx.Client(base_url=stack.url, timeout=20) as client:
        assert client.get("/readyz").status_code == 200

        take_down(own_postgres)
        # A create waits 5 s for Postgres before it fails: long enough for all processes to try several times.
        with ThreadPoolExecutor() as clients:
            creating = clients.submit(client.post, "/v1/users", json=user("refused"))
            assert client.get("/healthz").status_code == 200
            assert client.get("/readyz").status_code == 503
            refused = creating.result()
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.headers["Content-Type"] == "application/problem+json"
        own_postgres.restart()
        eventually(lambda: is_accepting(own_postgres), 20, "Postgres is back")
        back = time.monotonic()
        eventually(lambda: client.get("/readyz").status_code == 200, 20, "the service is ready")
        recovery = time.monotonic() - back

        assert client.post("/v1/users", json=user("after")).status_code == 201
        eventually(lambda: len(mailbox.mails) >= 21, 20, "the mails")
        with postgres.connect(own_postgres.url, "test") as connection:
            eventually(
                lambda: not connection.execute("SELECT FROM outbox WHERE status <> 'done'").fetchall(), 10, "all done"
            )
            created = [row["username"] for row in connection.execute("SELECT username FROM users")]

    assert sorted(created) == sorted([*names, "after"])
    assert sorted(address for address, _ in mailbox.mails) == sorted(f"{name}@example.com" for name in created)
    for process in (relay, worker):
        assert len(process.events("Postgres is away")) == 1, process.text()
        assert len(process.events("Postgres is back")) == 1, process.text()
    assert not [process.text() for process in (service, relay, worker) if not process.is_up()]
    assert not [process.text() for process in (service, relay, worker) if "Traceback" in process.text()]
    assert recovery < RECOVERY


def test_postgres_goes_while_handlers_run(stack: Stack, own_postgres: EmbeddedServer, mailbox: Mailbox) -> None:
    """A row whose mail is being sent when Postgres stops is completed when Postgres is back: one mail."""
    mailbox.data_delay = 1
    stack.run_all("relay", "worker", OUTBOX_LEASE="5")
    names = [f"user_{n}" for n in range(5)]
    with postgres.connect(own_postgres.url, "test") as connection:
        add_users(connection, names)
    eventually(lambda: mailbox.taking == 5, 10, "five mails are being sent")

    take_down(own_postgres)
    eventually(lambda: len(mailbox.mails) == 5, 10, "five mails")
    own_postgres.restart()

    eventually(lambda: is_accepting(own_postgres), 20, "Postgres is back")
    with postgres.connect(own_postgres.url, "test") as connection:
        eventually(
            lambda: not connection.execute("SELECT FROM outbox WHERE status <> 'done'").fetchall(), 20, "all done"
        )
        attempts = [row["attempts"] for row in connection.execute("SELECT attempts FROM outbox")]
    assert attempts == [1] * 5
    assert len(mailbox.mails) == 5


def test_a_service_that_starts_without_postgres(stack: Stack, own_postgres: EmbeddedServer) -> None:
    """It logs once that Postgres is away, whatever the number of requests, and once that it is back."""
    take_down(own_postgres)
    service = stack.run("service")
    with httpx.Client(base_url=stack.url, timeout=20) as client:
        assert [client.get("/readyz").status_code for _ in range(2)] == [503, 503]
        own_postgres.restart()
        eventually(lambda: client.get("/readyz").status_code == 200, 20, "the service is ready")
    service.await_event("Postgres is back")  # lines are written with a short delay
    assert [len(service.events(f"Postgres is {state}")) for state in ("away", "back")] == [1, 1]
