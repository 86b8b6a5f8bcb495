"""Several relays and workers handle every row once, also if one of them is killed."""

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
COUNTED_ROWS = 800


class Number(BaseModel):
    """Payload of `count_me`."""

    number: int


COUNT_ME = outbox.Task("count_me", Number)


@outbox.handler(COUNT_ME)
def count_me(payload: Number, context: outbox.Context) -> dict[str, object]:
    """Logs its number; faster than a mail, for the test that kills a relay."""
    return {"number": payload.number, "attempt": context.attempt}


@pytest.fixture
def stack(stack: Stack) -> Stack:
    """A stack with small batches, so that every process gets some rows."""
    stack.environment |= {**QUICK, "OUTBOX_BATCH": "20"}
    return stack


def assert_done_at_first_attempt(connection: Connection, count: int) -> None:
    """Waits until all rows are done, and checks their number and that each needed one attempt."""

    def unfinished() -> int:
        row = connection.execute("SELECT count(*) AS rows FROM outbox WHERE status <> 'done'").fetchone()
        assert row is not None
        return int(row["rows"])

    eventually(lambda: unfinished() == 0, 40, "all rows are done")
    attempts = connection.execute("SELECT attempts, count(*) AS rows FROM outbox GROUP BY attempts").fetchall()
    assert attempts == [{"attempts": 1, "rows": count}]


def enqueued(relay: Process) -> list[tuple[int, int]]:
    """Returns row and delivery of each hand-over of a relay."""
    return [(line["row"], line["delivery"]) for line in relay.events("enqueued task")]


def test_two_relays_and_two_workers_on_2000_rows(stack: Stack, connection: Connection, mailbox: Mailbox) -> None:
    """2,000 rows give 2,000 mails, one per recipient and at the first attempt, and all four processes take part."""
    one, two, *workers = stack.run_all("relay", "relay", "worker", "worker")

    add_users(connection, [f"user_{n}" for n in range(ROWS)])

    assert_done_at_first_attempt(connection, ROWS)
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
    """After a SIGKILL during hand-overs, another relay continues, and each row is handled once."""
    first = stack.run("relay", OUTBOX_BATCH="5")
    with redis_connection.connect(redis_url, "test") as client:
        with connection.transaction():
            for number in range(COUNTED_ROWS):
                outbox.add(connection, COUNT_ME, Number(number=number))
        eventually(lambda: client.llen("rq:queue:default") > 100, 10, "a hundred jobs")
        first.kill()
        in_redis = client.llen("rq:queue:default")
    assert 100 < in_redis < COUNTED_ROWS, "it was in the middle"

    _, worker = stack.run_all("relay", "worker", OUTBOX_HANDLERS=__name__)

    assert_done_at_first_attempt(connection, COUNTED_ROWS)
    handled = [line["number"] for line in worker.events("processed task")]
    assert sorted(handled) == list(range(COUNTED_ROWS))
