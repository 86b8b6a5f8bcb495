"""All processes use Postgres' time: a relay or a worker with a clock an hour off does no harm."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import pytest

from tests.conftest import Connection
from tests.support.mailbox import Mailbox
from tests.support.processes import QUICK, Process, Stack, add_users
from tests.support.waiting import eventually

pytestmark = pytest.mark.unmeasured

HOUR = 3600
DELAY = 1.5


@pytest.mark.parametrize(("relays", "workers"), [(HOUR, -HOUR), (-HOUR, HOUR)], ids=["relay ahead", "worker ahead"])
def test_clocks_that_are_an_hour_off(
    stack: Stack, connection: Connection, mailbox: Mailbox, relays: int, workers: int
) -> None:
    """A delayed mail is neither early nor late; no row is swept, rescued, handed over twice or deleted too soon.

    The handler takes longer than the lease, so that the row depends on its renewal. A done row is kept for its
    retention time, neither an hour longer nor an hour less.
    """
    mailbox.data_delay = 1.5
    connection.execute(
        "INSERT INTO outbox (task, payload, status, done_at)"
        " VALUES ('old', '{}', 'done', now() - interval '20 min'), ('recent', '{}', 'done', now())"
    )
    stack.environment |= {**QUICK, "OUTBOX_LEASE": "1", "OUTBOX_RETENTION": "600"}
    relay = with_wrong_clock(stack, "relay", relays)
    worker = with_wrong_clock(stack, "worker", workers)
    assert error_of(relay) == pytest.approx(relays, abs=60)
    assert error_of(worker) == pytest.approx(workers, abs=60)

    add_users(connection, ["alice"], delay=DELAY)

    eventually(lambda: status(connection) == "done", 15, "the row is done")
    row = connection.execute(
        "SELECT attempts, delivery, extract(epoch FROM run_at - created_at)::float8 AS delay,"
        " extract(epoch FROM started_at - run_at)::float8 AS late FROM outbox WHERE task = 'send_verify_email'"
    ).fetchone()
    assert row
    assert (row["attempts"], row["delivery"], row["delay"]) == (1, 1, DELAY)
    assert 0 <= row["late"] < 1.5
    (mail,) = mailbox.to("alice@example.com")
    assert mailbox.taking == 1
    sent_at = parsedate_to_datetime(mail["Date"]).replace(tzinfo=UTC)
    assert abs((sent_at - datetime.now(UTC)).total_seconds()) < 60
    assert not relay.events("swept row")
    assert not relay.events("rescued row")
    assert not worker.events("dropped job")
    kept = connection.execute("SELECT task FROM outbox WHERE task IN ('old', 'recent')").fetchall()
    assert kept == [{"task": "recent"}]


def status(connection: Connection) -> str:
    """Returns the status of the row of the mail."""
    row = connection.execute("SELECT status FROM outbox WHERE task = 'send_verify_email'").fetchone()
    assert row
    return str(row["status"])


def with_wrong_clock(stack: Stack, module: str, error: int) -> Process:
    """Starts a process with a clock that is `error` seconds off."""
    return stack.start("tests.support.wrong_clock", CLOCK_OF=module, CLOCK_ERROR=str(error))


def error_of(process: Process) -> float:
    """Returns by how many seconds the time in a process's log is off."""
    logged = datetime.fromisoformat(process.await_event("started")["timestamp"])
    return (logged - datetime.now(UTC)).total_seconds()
