"""Processes follow a fail-over of Redis, in which the address moves and no socket of the old primary is closed."""

from collections.abc import Iterator

import pytest
from rq import Worker
from rq.command import send_shutdown_command

from tests.conftest import Connection, short_folder
from tests.support.mailbox import Mailbox
from tests.support.processes import QUICK, Process, Stack, add_users
from tests.support.redis_pair import RedisPair, redis_pair
from tests.support.waiting import eventually

pytestmark = pytest.mark.unmeasured


@pytest.fixture
def pair() -> Iterator[RedisPair]:
    """A primary and its replica."""
    with short_folder() as folder, redis_pair(folder) as servers:
        yield servers


@pytest.fixture
def running(stack: Stack, pair: RedisPair) -> list[Process]:
    """A relay and a worker that use the primary."""
    stack.environment |= {**QUICK, "REDIS_URL": pair.url}
    processes = stack.run_all("relay", "worker")
    eventually(lambda: Worker.all(connection=pair.primary), 10, "the worker's registration")
    return processes


def assert_one_mail_each(mailbox: Mailbox, connection: Connection, names: list[str]) -> None:
    """Waits until all rows are done, and checks that each user got one mail."""
    undone = "SELECT FROM outbox WHERE status <> 'done' LIMIT 1"
    eventually(lambda: not connection.execute(undone).fetchall(), 30, "all rows are done")
    assert sorted(address for address, _ in mailbox.mails) == sorted(f"{name}@example.com" for name in names)


def test_idle_processes_follow_a_fail_over(
    running: list[Process], pair: RedisPair, connection: Connection, mailbox: Mailbox
) -> None:
    """Relay and worker reconnect, mails are sent, and RQ's commands work on the new primary.

    Each logs the outage once when it begins and once when it ends.
    """
    add_users(connection, ["before"])
    assert_one_mail_each(mailbox, connection, ["before"])

    pair.fail_over()
    add_users(connection, ["after_0", "after_1"])

    assert_one_mail_each(mailbox, connection, ["before", "after_0", "after_1"])
    for process in running:
        eventually(lambda process=process: process.events("Redis is back"), 20)  # type: ignore[misc]
        assert len(process.events("Redis is away")) == len(process.events("Redis is back")) == 1, process.text()
    names = {"outbox-relay", "outbox-worker"}
    eventually(
        lambda: not names & {client["name"] for client in pair.other.client_list()}, 5, "the old one has no clients"
    )
    (worker,) = eventually(lambda: Worker.all(connection=pair.primary), 10, "the worker's registration")
    send_shutdown_command(pair.primary, worker.name)
    assert running[1].wait(15) == 0, running[1].text()


def test_a_fail_over_under_load(
    running: list[Process], pair: RedisPair, connection: Connection, mailbox: Mailbox
) -> None:
    """A fail-over while jobs wait in the queues and in rq-scheduler's set costs no mail and repeats none."""
    names = [f"user_{n}" for n in range(300)]
    add_users(connection, names[:100], delay=1)
    add_users(connection, names[100:200])
    eventually(lambda: len(mailbox.mails) > 20, 20, "mails are being sent")

    pair.fail_over()
    add_users(connection, names[200:])

    assert_one_mail_each(mailbox, connection, names)
    assert all(process.is_up() for process in running)
