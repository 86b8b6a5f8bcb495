"""Redis stops, is emptied, or comes back empty: users are created as usual, and each gets one mail."""

import time

import pytest
import redis

from outbox.devstack.embedded import EmbeddedServer
from outbox.runtime import redis_connection
from tests.conftest import Connection
from tests.support.mailbox import Mailbox
from tests.support.processes import QUICK, Stack, add_users, take_down
from tests.support.waiting import eventually

pytestmark = pytest.mark.unmeasured

LIMIT = 2.0
"""Upper bound of the seconds of a create on a busy machine with two cores; a wait for Redis would take 5."""


@pytest.fixture
def stack(stack: Stack, own_redis: EmbeddedServer) -> Stack:
    """A stack on a Redis of its own."""
    stack.environment |= {**QUICK, "REDIS_URL": own_redis.url}
    return stack


def create_for(stack: Stack, prefix: str, seconds: float) -> list[str]:
    """Creates users one by one for some seconds, checks that each is created quickly, and returns their names."""
    names: list[str] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or not names:
        started = time.monotonic()
        assert stack.create_user(f"{prefix}_{len(names)}")[0] == 201
        assert time.monotonic() - started < LIMIT
        names.append(f"{prefix}_{len(names)}")
    return names


def assert_one_mail_each(mailbox: Mailbox, connection: Connection, names: list[str]) -> None:
    """Waits until all rows are done, and checks that each user got one mail."""
    eventually(lambda: _unfinished(connection) == 0, 20, "all rows are done")
    assert sorted(address for address, _ in mailbox.mails) == sorted(f"{name}@example.com" for name in names)


def _unfinished(connection: Connection) -> int:
    row = connection.execute("SELECT count(*) AS rows FROM outbox WHERE status <> 'done'").fetchone()
    assert row is not None
    return int(row["rows"])


def test_redis_stopped_before_while_and_after_users_are_created(
    stack: Stack, own_redis: EmbeddedServer, connection: Connection, mailbox: Mailbox
) -> None:
    """Every create gets 201 as usual, and every user gets exactly one mail once Redis is back, empty.

    All three processes stay up; relay and worker log once that Redis is away and once that it is back.
    """
    service, relay, worker = stack.run_all("service", "relay", "worker", VERIFY_EMAIL_DELAY="1")
    names = create_for(stack, "before", 0.5)
    eventually(lambda: len(relay.events("enqueued task")) >= len(names), 10, "all rows are in Redis")
    assert not mailbox.mails, "the jobs must be in rq-scheduler's set when Redis stops"

    take_down(own_redis)
    names += create_for(stack, "during", 2.5)
    assert stack.get("/readyz")[0] == 200
    own_redis.restart()
    names += create_for(stack, "after", 0.3)

    assert_one_mail_each(mailbox, connection, names)
    for process in (relay, worker):
        eventually(lambda process=process: process.events("Redis is back"), 10)  # type: ignore[misc]
        assert len(process.events("Redis is away")) == 1, process.text()
        assert len(process.events("Redis is back")) == 1, process.text()
    assert not [process.text() for process in (service, relay, worker) if not process.is_up()]
    assert "Redis" not in service.text()


def test_processes_start_without_redis(
    stack: Stack, own_redis: EmbeddedServer, connection: Connection, mailbox: Mailbox
) -> None:
    """A relay and a worker that start while Redis is away wait for it, and then work."""
    take_down(own_redis)
    _, relay, worker = stack.run_all("service", "relay", "worker")
    names = create_for(stack, "early", 0.5)
    for process in (relay, worker):
        process.await_event("Redis is away")

    own_redis.restart()

    assert_one_mail_each(mailbox, connection, names)
    assert [len(process.events("Redis is away")) for process in (relay, worker)] == [1, 1]


def test_flushall_while_jobs_wait(
    stack: Stack, own_redis: EmbeddedServer, connection: Connection, mailbox: Mailbox
) -> None:
    """Jobs that FLUSHALL deletes from a queue and from rq-scheduler's set are handed over again, once and in time."""
    stack.run("relay")
    queued, scheduled = [f"queued_{n}" for n in range(20)], [f"scheduled_{n}" for n in range(20)]
    add_users(connection, queued)
    add_users(connection, scheduled, delay=3)
    with redis_connection.connect(own_redis.url, "test") as client:
        eventually(lambda: counts(client) == (20, 20), 10, "20 jobs in the queue and 20 in the set")
        client.flushall()
        assert counts(client) == (0, 0)

    stack.run("worker")

    assert_one_mail_each(mailbox, connection, queued + scheduled)
    early = connection.execute("SELECT count(*) AS rows FROM outbox WHERE started_at < run_at").fetchone()
    assert early == {"rows": 0}


def counts(client: redis.Redis) -> tuple[int, int]:
    """Returns the number of jobs in the queue `critical` and in rq-scheduler's set."""
    return client.llen("rq:queue:critical"), client.zcard("rq:scheduler:scheduled_jobs")
