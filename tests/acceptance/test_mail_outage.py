"""An outage of the mail server counts no attempt and stops no other task; all mails are sent when it is back."""

import socket
import time
from collections.abc import Iterator

import pytest

import outbox
from tests.conftest import Connection
from tests.support.mailbox import Mailbox, free_port, serve_mailbox, serve_script
from tests.support.processes import Process, Stack, add_users
from tests.support.tasks import RETURN
from tests.support.waiting import eventually

pytestmark = pytest.mark.unmeasured


def outage_events(worker: Process) -> list[str]:
    """Returns a worker's log events about the outage: first each beginning, then each end."""
    return [event for event in ("mail server is away", "mail server is back") for _ in worker.events(event)]


def count_unfinished(connection: Connection) -> int:
    """Returns the number of rows that are not done."""
    (row,) = connection.execute("SELECT count(*) AS rows FROM outbox WHERE status <> 'done'").fetchall()
    return int(row["rows"])


def test_an_outage_of_the_mail_server_counts_no_attempt(stack: Stack, connection: Connection) -> None:
    """With a backlog: rows are not handed over again and again, other tasks go on, one log line per change."""
    port = free_port()
    _, *workers = stack.run_all(
        "relay", "worker", "worker", SMTP_URL=f"smtp://127.0.0.1:{port}", OUTBOX_HANDLERS="tests.support.tasks"
    )
    names = [f"user_{n}" for n in range(500)]
    add_users(connection, names)
    eventually(lambda: all(worker.events("mail server is away") for worker in workers), 15, "both have logged it")
    with connection.transaction():
        for _ in range(300):
            outbox.add(connection, RETURN, {})
    eventually(lambda: count_unfinished(connection) == len(names), 15, "the other tasks are done")
    began = time.monotonic()
    (before,) = connection.execute("SELECT sum(delivery) AS deliveries FROM outbox").fetchall()
    time.sleep(2)
    (after,) = connection.execute("SELECT sum(delivery) AS deliveries FROM outbox").fetchall()
    handed_over = after["deliveries"] - before["deliveries"]
    assert handed_over < 150 * (time.monotonic() - began), "rows are handed over too often"
    rows = connection.execute("SELECT DISTINCT attempts, last_error FROM outbox WHERE status = 'pending'").fetchall()
    assert all("Connection refused" in str(row["last_error"]) for row in rows if row["last_error"])

    with serve_mailbox(port) as mailbox:
        eventually(lambda: count_unfinished(connection) == 0, 30, "all are done")
        assert sorted(address for address, _ in mailbox.mails) == sorted(f"{name}@example.com" for name in names)
    assert connection.execute("SELECT DISTINCT attempts FROM outbox").fetchall() == [{"attempts": 1}]
    for worker in workers:
        assert outage_events(worker)[0] == "mail server is away"
        assert outage_events(worker)[1:] in ([], ["mail server is back"]), "the other may have sent all mails by then"
        assert not worker.events("process task failed")
        assert "Traceback" not in worker.text()


def test_users_created_while_the_mail_server_is_down(stack: Stack, connection: Connection) -> None:
    """Their rows have the error; once the server is up, the mails arrive within seconds."""
    port = free_port()
    stack.run_all("service", "relay", "worker", SMTP_URL=f"smtp://127.0.0.1:{port}")
    names = [f"user_{n}" for n in range(5)]
    assert [stack.create_user(name)[0] for name in names] == [201] * 5

    def have_errors() -> bool:
        return len(connection.execute("SELECT FROM outbox WHERE last_error LIKE '%Connection refused%'").fetchall()) > 4

    eventually(have_errors, 15, "all rows have the error")
    with serve_mailbox(port) as mailbox:
        eventually(lambda: len(mailbox.mails) >= 5, 10, "five mails")
        eventually(lambda: count_unfinished(connection) == 0, 5, "done")
    assert sorted(address for address, _ in mailbox.mails) == sorted(f"{name}@example.com" for name in names)
    assert connection.execute("SELECT DISTINCT attempts FROM outbox").fetchall() == [{"attempts": 1}]


@pytest.fixture
def refusing_port() -> Iterator[int]:
    """A port that refuses connections and that no other server can take, as it could take a free port."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield int(bound.getsockname()[1])


def test_a_worker_that_cannot_reach_the_mail_server_leaves_mails_to_another(
    stack: Stack, connection: Connection, mailbox: Mailbox, refusing_port: int
) -> None:
    """It fails fast, but takes few rows of a burst, and gives them back without counting an attempt."""
    away = stack.start("worker", SMTP_URL=f"smtp://127.0.0.1:{refusing_port}")
    able = stack.start("worker")
    stack.run("relay")
    for worker in (away, able):
        worker.await_event("started", 20)
    add_users(connection, ["first"])
    eventually(lambda: count_unfinished(connection) == 0, 15, "the first")
    add_users(connection, [f"user_{n}" for n in range(300)])
    eventually(lambda: count_unfinished(connection) == 0, 15, "all are done")
    assert len(mailbox.mails) == 301
    rows = connection.execute("SELECT attempts, delivery FROM outbox").fetchall()
    assert {row["attempts"] for row in rows} == {1}
    assert sum(row["delivery"] > 1 for row in rows) < 150
    assert not away.events("process task failed")


def test_a_server_with_a_limit_of_connections(stack: Stack, connection: Connection) -> None:
    """Two workers share a server that permits three connections: all mails are sent, at the first attempt."""
    with serve_script(limit=3) as server:
        stack.run_all("relay", "worker", "worker", SMTP_URL=server.url)
        add_users(connection, [f"user_{n}" for n in range(200)])
        eventually(lambda: count_unfinished(connection) == 0, 20, "all are done")
        assert server.mails == 200
    assert connection.execute("SELECT DISTINCT attempts FROM outbox").fetchall() == [{"attempts": 1}]
