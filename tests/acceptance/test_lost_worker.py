"""A mail is not lost if its worker is killed."""

import signal

import pytest

import outbox
from tests.conftest import Connection
from tests.support.mailbox import Mailbox
from tests.support.processes import QUICK, Stack, add_users
from tests.support.tasks import KILL_THE_WORKER, PAUSE
from tests.support.waiting import eventually

pytestmark = pytest.mark.unmeasured


@pytest.fixture
def stack(stack: Stack) -> Stack:
    """A stack that recovers lost rows within seconds."""
    stack.environment |= QUICK
    return stack


def test_a_killed_workers_rows_are_sent_by_another(stack: Stack, connection: Connection, mailbox: Mailbox) -> None:
    """After a SIGKILL while handlers wait for the mail server, another worker sends each mail once."""
    mailbox.data_delay = 60
    first, _ = stack.run_all("worker", "relay")
    names = [f"user_{n}" for n in range(8)]  # one per connection of the worker to the mail server
    add_users(connection, names)
    eventually(lambda: mailbox.taking == 8, 10, "eight handlers wait for the mail server")

    first.kill()
    mailbox.data_delay = 0
    second = stack.run("worker")

    eventually(lambda: len(mailbox.mails) >= 8, 20, "eight mails")
    eventually(lambda: not connection.execute("SELECT FROM outbox WHERE status <> 'done'").fetchall(), 10, "all done")
    assert sorted(address for address, _ in mailbox.mails) == sorted(f"{name}@example.com" for name in names)
    rows = connection.execute("SELECT attempts, delivery, worker, last_error FROM outbox").fetchall()
    assert {(row["attempts"], row["delivery"]) for row in rows} == {(2, 2)}
    assert {row["worker"] for row in rows} == {second.events("started")[0]["worker"]}
    assert all(first.events("started")[0]["worker"] in row["last_error"] for row in rows)
    assert all("vanished" in row["last_error"] for row in rows)


def test_a_living_worker_keeps_its_rows_beyond_the_lease(
    stack: Stack, connection: Connection, mailbox: Mailbox
) -> None:
    """A handler that takes longer than the lease keeps its row, because leases are renewed: one mail is sent."""
    mailbox.data_delay = 2.5
    stack.run_all("worker", "worker", "relay", OUTBOX_LEASE="1")
    add_users(connection, ["slow"])

    eventually(lambda: len(mailbox.mails) == 1, 15, "the mail")
    eventually(lambda: not connection.execute("SELECT FROM outbox WHERE status <> 'done'").fetchall(), 5, "done")
    assert mailbox.taking == 1
    assert connection.execute("SELECT attempts, delivery FROM outbox").fetchall() == [{"attempts": 1, "delivery": 1}]


def test_a_row_that_kills_its_worker_every_time(stack: Stack, connection: Connection) -> None:
    """It becomes `dead` after its retries, with an error that says why, and makes no other row dead.

    The test restarts the worker each time, as systemd would. It shortens the wait of rows that lost a worker twice, so
    that one worker takes all rows together again, which that wait would prevent.
    """
    stack.environment |= {"OUTBOX_LEASE": "1", "OUTBOX_HORIZON": "1", "OUTBOX_HANDLERS": "tests.support.tasks"}
    stack.run("relay")
    with connection.transaction():
        outbox.add(connection, KILL_THE_WORKER, {}, max_retries=2)
        for _ in range(20):
            outbox.add(connection, PAUSE, {})
    eventually(lambda: not connection.execute("SELECT FROM outbox WHERE status <> 'enqueued'").fetchall(), 10)
    workers = [stack.start("worker")]  # takes all rows at once

    def has_ended() -> bool:
        if not workers[-1].is_up():
            workers.append(stack.start("worker"))
        connection.execute("UPDATE outbox SET run_at = now() WHERE status = 'pending' AND run_at > now()")
        return not connection.execute("SELECT FROM outbox WHERE status NOT IN ('done', 'dead')").fetchall()

    eventually(has_ended, 60, "every row is done or dead")
    (dead,) = connection.execute("SELECT * FROM outbox WHERE status = 'dead'").fetchall()
    assert (dead["task"], dead["attempts"]) == (KILL_THE_WORKER.name, 3)
    assert dead["last_error"] == f"the worker {dead['worker']} vanished: it did not renew its lease in time"
    others = connection.execute("SELECT attempts FROM outbox WHERE status = 'done'").fetchall()
    assert max(row["attempts"] for row in others) > 1, "other rows ran beside it"
    exit_codes = [worker.wait() for worker in workers if not worker.is_up()]
    assert exit_codes == [-signal.SIGKILL] * 3, "it had three attempts, and nothing else ended a worker"
