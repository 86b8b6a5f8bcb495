"""Any number of relays and workers side by side: every row is handled once, also when one of them is killed."""

import re
from collections import Counter

import pytest
from pydantic import BaseModel

import outbox
from outbox.runtime import redis_connection
from tests.conftest import Connection
from tests.support.mailbox import Mailbox
from tests.support.processes import QUICK, Process, Stack, add_users
from tests.support.waiting import eventually

pytestmark = pytest.mark.unmeasured

ROWS = 2000
SOME = 800


class Number(BaseModel):
    """Payload of `count_me`."""

    number: int


COUNT_ME = outbox.Task("count_me", Number)


@outbox.handler(COUNT_ME)
def count_me(payload: Number, context: outbox.Context) -> dict[str, object]:
    """Leaves a trace in the log; it is what a killed relay's rows are about, as mails would take longer."""
    return {"number": payload.number, "attempt": context.attempt}


@pytest.fixture
def stack(stack: Stack) -> Stack:
    """A stack with small batches, so that everybody gets some."""
    stack.environment |= {**QUICK, "OUTBOX_BATCH": "20"}
    return stack


def all_done_at_once(connection: Connection, count: int) -> None:
    """Waits until so many rows are done; each must have been so at its first attempt."""

    def unfinished() -> int:
        row = connection.execute("SELECT count(*) AS rows FROM outbox WHERE status <> 'done'").fetchone()
        assert row is not None
        return int(row["rows"])

    eventually(lambda: unfinished() == 0, 40, "all rows are done")
    attempts = connection.execute("SELECT attempts, count(*) AS rows FROM outbox GROUP BY attempts").fetchall()
    assert attempts == [{"attempts": 1, "rows": count}]


def enqueued(relay: Process) -> list[tuple[int, int]]:
    """Returns row and delivery of what a relay has handed over."""
    return [(line["row"], line["delivery"]) for line in relay.events("enqueued task")]


def test_two_relays_and_two_workers_on_2000_rows(stack: Stack, connection: Connection, mailbox: Mailbox) -> None:
    """2,000 rows give 2,000 mails, one per recipient and attempt 1 each, and all four processes had a part in it."""
    one, two, *workers = stack.run_all("relay", "relay", "worker", "worker")

    add_users(connection, [f"user_{n}" for n in range(ROWS)])

    all_done_at_once(connection, ROWS)
    assert Counter(address for address, _ in mailbox.received) == Counter(f"user_{n}@example.com" for n in range(ROWS))
    assert len({_message_id(mail) for _, mail in mailbox.received}) == ROWS
    assert enqueued(one)
    assert enqueued(two)
    assert not set(enqueued(one)) & set(enqueued(two)), "no hand-over was made twice"
    took_part = {row["worker"] for row in connection.execute("SELECT DISTINCT worker FROM outbox")}
    assert took_part == {worker.events("started")[0]["worker"] for worker in workers}


def _message_id(mail: bytes) -> bytes:
    found = re.search(rb"(?im)^message-id:\s*(\S+)", mail)
    assert found
    return found[1]


def test_a_relay_is_killed_in_the_middle(stack: Stack, connection: Connection, redis_url: str) -> None:
    """SIGKILL strikes while batches are handed over; another relay goes on, and each row is handled once."""
    first = stack.run("relay", OUTBOX_BATCH="5")
    with redis_connection.connect(redis_url, "test") as client:
        with connection.transaction():
            for number in range(SOME):
                outbox.add(connection, COUNT_ME, Number(number=number))
        eventually(lambda: client.llen("rq:queue:default") > 100, 10, "a hundred jobs")
        first.kill()
        in_redis = client.llen("rq:queue:default")
    assert 100 < in_redis < SOME, "it was in the middle"

    _, worker = stack.run_all("relay", "worker", OUTBOX_HANDLERS=__name__)

    all_done_at_once(connection, SOME)
    handled = [line["number"] for line in worker.events("processed task")]
    assert sorted(handled) == list(range(SOME))
