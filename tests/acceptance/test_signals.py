"""After SIGTERM a process finishes the work it has begun and leaves the rest to others; no work is done twice."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from outbox.runtime import redis_connection
from tests.conftest import Connection
from tests.support.mailbox import Mailbox
from tests.support.processes import QUICK, Stack, add_users
from tests.support.waiting import eventually


@pytest.fixture
def stack(stack: Stack) -> Stack:
    """A stack that recovers lost rows within seconds."""
    stack.environment |= QUICK
    return stack


def test_the_service_finishes_the_requests_in_flight(stack: Stack, connection: Connection) -> None:
    """Of many concurrent creates, those that had begun get 201 and have a row; the others leave nothing behind."""
    service = stack.run("service")
    answers: dict[str, int] = {}

    def create(name: str) -> None:
        answers[name] = stack.create_user(name)[0]

    with ThreadPoolExecutor(25) as clients:
        # Two creates per client: some are in flight at the signal, and some begin after it.
        for n in range(50):
            clients.submit(create, f"user_{n}")
        eventually(lambda: len(answers) >= 5, 10, "the first answers")
        service.stop()
        begun = len([line for line in service.events("received an HTTP request") if line["path"] == "/v1/users"])

    created = {name for name, status in answers.items() if status == 201}
    assert service.popen.returncode == 0, service.text()
    assert set(answers.values()) <= {201, 0}, "a client got 201 or no answer"
    assert 5 < len(created) < 50
    assert begun == len(created), "every request that had begun was answered"
    assert {row["username"] for row in connection.execute("SELECT username FROM users")} == created
    rows = connection.execute("SELECT payload ->> 'username' AS username FROM outbox").fetchall()
    assert sorted(row["username"] for row in rows) == sorted(created)
    assert "Traceback" not in service.text()


def test_a_request_that_outlasts_the_grace_is_answered_and_undone(stack: Stack, connection: Connection) -> None:
    """The client gets 503, its user is not created, and the service exits with code 0."""
    service = stack.run("service", OUTBOX_GRACE="1")
    with ThreadPoolExecutor(1) as client:
        with connection.transaction():
            connection.execute("LOCK TABLE users")
            answer = client.submit(stack.create_user, "alice")
            eventually(lambda: _waits_for_a_lock(connection), 10, "the request waits")
            started = time.monotonic()
            assert service.stop() == 0, service.text()
            assert time.monotonic() - started < 10
        assert answer.result()[0] == 503
    assert connection.execute("SELECT FROM users").fetchall() == []
    assert connection.execute("SELECT FROM outbox").fetchall() == []
    assert "Traceback" not in service.text()


def _waits_for_a_lock(connection: Connection) -> bool:
    waiting = "SELECT FROM pg_locks WHERE NOT granted AND relation = 'users'::regclass"
    return bool(connection.execute(waiting).fetchall())


def test_the_relay_stops_between_batches(stack: Stack, connection: Connection, redis_url: str) -> None:
    """It exits with code 0 and leaves every row either pending or enqueued with its job; another relay continues."""
    rows = 3000
    relay = stack.run("relay", OUTBOX_BATCH="5")
    add_users(connection, [f"user_{n}" for n in range(rows)])
    with redis_connection.connect(redis_url, "test") as client:

        def jobs() -> list[str]:
            return sorted(job_id.decode() for job_id in client.lrange("rq:queue:critical", 0, -1))

        def enqueued() -> list[str]:
            rows = connection.execute("SELECT id, delivery FROM outbox WHERE status = 'enqueued'")
            return sorted(f"{row['id']}-{row['delivery']}" for row in rows)

        eventually(lambda: client.llen("rq:queue:critical") > 100, 10, "a hundred jobs")
        assert relay.stop() == 0, relay.text()
        assert 100 < len(jobs()) < rows, "it was in the middle"
        assert jobs() == enqueued()
        assert relay.events("stopped")

        other = stack.run("relay")
        eventually(lambda: len(enqueued()) == rows, 10, "all rows are handed over")
        eventually(lambda: len(jobs()) == rows, 5, "all jobs")
        assert jobs() == enqueued()
        assert other.stop() == 0


def test_the_worker_finishes_running_handlers(stack: Stack, connection: Connection, mailbox: Mailbox) -> None:
    """It waits for its handlers and exits with code 0 within the grace; another worker does the rest: one mail each."""
    mailbox.data_delay = 0.5
    worker, _ = stack.run_all("worker", "relay", OUTBOX_CONCURRENCY="8", OUTBOX_GRACE="10")
    names = [f"user_{n}" for n in range(40)]
    add_users(connection, names)
    eventually(lambda: mailbox.taking > 8, 10, "the second round of handlers")

    started = time.monotonic()
    assert worker.stop() == 0, worker.text()
    assert time.monotonic() - started < 5
    assert worker.events("stopped")[0]["cut_short"] == 0
    assert not worker.events("outcomes lost at shutdown")
    assert mailbox.taking == len(mailbox.mails), "every handler that had begun has ended"
    assert 8 < len(mailbox.mails) < 40
    counts = connection.execute("SELECT status, count(*) AS rows FROM outbox GROUP BY status").fetchall()
    left = {row["status"]: row["rows"] for row in counts}
    assert left["done"] == len(mailbox.mails), "every sent mail's row is done"
    assert "running" not in left

    mailbox.data_delay = 0
    stack.run("worker")
    eventually(lambda: not connection.execute("SELECT FROM outbox WHERE status <> 'done'").fetchall(), 20, "all done")
    assert sorted(address for address, _ in mailbox.mails) == sorted(f"{name}@example.com" for name in names)
    assert {row["attempts"] for row in connection.execute("SELECT attempts FROM outbox")} == {1}


def test_the_worker_does_not_wait_for_a_handler_beyond_the_grace(
    stack: Stack, connection: Connection, mailbox: Mailbox
) -> None:
    """A handler that hangs beyond the grace does not delay the exit: another worker takes its row."""
    mailbox.data_delay = 60
    worker, _ = stack.run_all("worker", "relay", OUTBOX_GRACE="1", OUTBOX_LEASE="60")
    add_users(connection, ["slow"])
    eventually(lambda: mailbox.taking == 1, 10, "a handler that hangs")

    started = time.monotonic()
    assert worker.stop() == 0, worker.text()
    assert 0.9 < time.monotonic() - started < 5
    assert worker.events("stopped")[0]["cut_short"] == 1

    mailbox.data_delay = 0
    stack.run("worker")
    eventually(lambda: not connection.execute("SELECT FROM outbox WHERE status <> 'done'").fetchall(), 30, "done")
    assert connection.execute("SELECT attempts FROM outbox").fetchall() == [{"attempts": 2}]
    assert [address for address, _ in mailbox.mails] == ["slow@example.com"]


@pytest.mark.parametrize("module", ["service", "relay", "worker"])
def test_repeated_signals_do_not_change_the_exit_code(stack: Stack, module: str) -> None:
    """A signal that arrives after the work has ended, while the interpreter shuts down, does not change the code."""
    process = stack.run(module)

    def has_ended() -> bool:
        process.send(signal.SIGTERM)
        return not process.is_up()

    eventually(has_ended, 20, "the process ends")
    assert process.wait() == 0, process.text()
    assert "Traceback" not in process.text()


def test_a_relay_that_can_start_no_thread_still_stops(stack: Stack) -> None:
    """It still exits with code 0 at SIGTERM."""
    relay = stack.run("tests.support.threadless", THREADLESS="relay")
    relay.send(signal.SIGUSR1)
    assert relay.stop() == 0, relay.text()
    assert relay.events("stopped")
