"""Claiming: the rows of jobs that a worker took from Redis become its own."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from structlog.testing import capture_logs

from outbox.rq_jobs import Delivery
from outbox.runtime import postgres, redis_connection
from outbox.runtime.settings import RelaySettings
from outbox_relay.publish import publish
from outbox_worker.claim import Claim, claim
from outbox_worker.queues import Queues
from tests.conftest import Connection
from tests.support.rows import add_row, read_row
from tests.support.waiting import eventually


def test_a_claim_holds_the_row(connection: Connection) -> None:
    """The row is running and has a lease, an attempt and its worker; the claim has all that an attempt needs."""
    delivery = add_row(connection, payload='{"n": 1}', attempts=2, delivery=3, timeout=7)
    claims = claim(connection, [delivery], "me", 15)
    assert claims == [Claim(delivery, "noted", '{"n": 1}', "default", 3, 3, 7, None)]
    row = read_row(connection, delivery)
    assert (row["status"], row["attempts"], row["worker"]) == ("running", 3, "me")
    assert 14 < row["lease"] <= 15
    assert row["started_at"]


def test_a_payload_that_python_cannot_read_does_not_delay_others(connection: Connection) -> None:
    """Postgres stores numbers of any length, Python reads 4,300 digits: the row is claimed like others."""
    deliveries = [add_row(connection, payload=payload) for payload in ('{"n": 1e5000}', '{"n": 1}')]
    assert [claimed.delivery for claimed in claim(connection, deliveries, "me", 15)] == deliveries


def test_a_claim_waits_for_the_relay_to_commit(
    connection: Connection, database_url: str, redis_url: str, relay_settings: RelaySettings
) -> None:
    """A job may be taken before its relay has committed: the claim waits for the commit and gets the row."""
    delivery = add_row(connection, status="pending", delivery=0)
    with (
        postgres.connect(database_url, "relay") as relaying,
        postgres.connect(database_url, "worker") as claiming,
        redis_connection.connect(redis_url, "test") as client,
        ThreadPoolExecutor(1) as thread,
    ):
        with relaying.transaction():
            assert publish(relaying, client, "default", relay_settings) == 1
            taken = Queues(client, {"default": 1}).take(5)
            assert taken == [Delivery(delivery.row_id, 1)], "Redis has the job before Postgres has committed"
            claims = thread.submit(claim, claiming, taken, "me", 15)
            eventually(
                lambda: connection.execute(
                    "SELECT FROM pg_stat_activity WHERE application_name = 'worker' AND wait_event_type = 'Lock'"
                ).fetchall(),
                what="the claim waits",
            )
            assert not claims.done()
        assert [claimed.delivery for claimed in claims.result(10)] == taken


def test_a_claim_of_a_row_that_the_relay_rolled_back_gets_nothing(connection: Connection, database_url: str) -> None:
    """The job of a transaction that failed after publishing is dropped; the row stays pending."""
    delivery = add_row(connection, status="pending", delivery=0)
    with (
        postgres.connect(database_url, "relay") as relaying,
        postgres.connect(database_url, "worker") as claiming,
        ThreadPoolExecutor(1) as thread,
    ):
        with relaying.transaction(force_rollback=True):
            relaying.execute("UPDATE outbox SET status = 'enqueued', delivery = 1 WHERE id = %s", [delivery.row_id])
            claims = thread.submit(claim, claiming, [Delivery(delivery.row_id, 1)], "me", 15)
            eventually(
                lambda: connection.execute(
                    "SELECT FROM pg_stat_activity WHERE application_name = 'worker' AND wait_event_type = 'Lock'"
                ).fetchall()
            )
        assert claims.result(10) == []
    assert read_row(connection, delivery)["status"] == "pending"


def test_jobs_whose_rows_cannot_be_claimed_are_dropped(connection: Connection) -> None:
    """Each is logged with the reason; their rows do not change, and a real job among them is claimed."""
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"delivery": 3}, 2, "the row's newest delivery is 3"),
        ({"delivery": 3}, 4, "the row's newest delivery is 3"),
        ({"status": "done"}, 1, "the row is done"),
        ({"status": "dead"}, 1, "the row is dead"),
        ({"status": "pending"}, 1, "the row is pending"),
        ({"status": "running"}, 1, "the row is running"),
        ({"delay": 60}, 1, "the row is not due yet"),
    ]
    offered = [(Delivery(add_row(connection, **columns).row_id, number), why) for columns, number, why in cases]
    before = connection.execute("SELECT * FROM outbox ORDER BY id").fetchall()
    real = add_row(connection)
    with capture_logs() as lines:
        claims = claim(connection, [*(delivery for delivery, _ in offered), real], "me", 15)
    assert [claimed.delivery for claimed in claims] == [real]
    assert {line["event"] for line in lines} == {"dropped job"}
    assert [(line["job"], line["why"]) for line in lines] == [(delivery.job_id, why) for delivery, why in offered]
    assert connection.execute("SELECT * FROM outbox WHERE id <> %s ORDER BY id", [real.row_id]).fetchall() == before


def test_rows_that_do_not_exist_are_dropped(connection: Connection) -> None:
    """Up to the largest possible id."""
    deliveries = [Delivery(1, 1), Delivery(2**63 - 1, 2**31 - 1), Delivery(2**31, 1)]
    with capture_logs() as lines:
        assert claim(connection, deliveries, "me", 15) == []
    assert [line["why"] for line in lines] == ["there is no such row"] * 3


def test_duplicates_in_one_batch_are_one_claim(connection: Connection) -> None:
    """The same job many times is claimed once; other deliveries of its row do not hide it."""
    delivery = add_row(connection, delivery=2)
    stale = [Delivery(delivery.row_id, 1), Delivery(delivery.row_id, 2**31 - 1)]
    with capture_logs() as lines:
        claims = claim(connection, [stale[1], delivery, delivery, stale[0], delivery], "me", 15)
    assert [claimed.delivery for claimed in claims] == [delivery]
    assert read_row(connection, delivery)["attempts"] == 1
    assert sorted(line["job"] for line in lines) == sorted(one.job_id for one in stale)


def test_of_two_workers_one_wins(connection: Connection, database_url: str) -> None:
    """Two workers claim the same jobs at the same time: each row is claimed by one of them."""
    deliveries = [add_row(connection) for _ in range(20)]

    def work(name: str) -> list[Delivery]:
        with postgres.connect(database_url, name) as own:
            return [claimed.delivery for one in deliveries for claimed in claim(own, [one], name, 15)]

    with ThreadPoolExecutor(2) as threads, capture_logs() as lines:
        claimed = list(threads.map(work, ["first", "second"]))
    assert sorted(claimed[0] + claimed[1]) == sorted(deliveries)
    assert len(lines) == 20
    assert {row["attempts"] for row in connection.execute("SELECT attempts FROM outbox")} == {1}


def test_a_repeated_claim_returns_its_own_rows(connection: Connection) -> None:
    """The first claim was committed and its answer lost: the row is this worker's, and the attempt counts once."""
    delivery = add_row(connection)
    first = claim(connection, [delivery], "me", 15)
    with capture_logs() as lines:
        assert claim(connection, [delivery], "me", 15) == first
        assert claim(connection, [delivery], "another", 15) == []
    assert (read_row(connection, delivery)["attempts"], read_row(connection, delivery)["worker"]) == (1, "me")
    assert [line["why"] for line in lines] == ["the row is running"]


def test_a_row_that_this_worker_holds_is_not_claimed_again(connection: Connection) -> None:
    """Nor is another row that has its id after a restore: the earlier handler may run. It is left to the sweep."""
    delivery = add_row(connection)
    with capture_logs() as lines:
        assert claim(connection, [delivery], "me", 15, held={Delivery(delivery.row_id, 7)}) == []
    assert read_row(connection, delivery)["status"] == "enqueued"
    assert [line["why"] for line in lines] == ["this worker holds that row already"]


def test_a_large_row_that_cannot_be_claimed_does_not_delay_others(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of a done row do not count; those of a row whose job is stale delay the others by one claim."""
    monkeypatch.setattr("outbox_worker.claim.MAX_BYTES", 1000)
    payload = f'{{"text": "{"x" * 1500}"}}'
    done = add_row(connection, payload=payload, status="done")
    live = add_row(connection)
    assert [claimed.delivery for claimed in claim(connection, [done, live], "me", 15, put_off=[])] == [live]
    newer, other, put_off = add_row(connection, payload=payload, delivery=2), add_row(connection), list[Delivery]()
    stale = Delivery(newer.row_id, 1)
    assert claim(connection, [stale, other], "me", 15, put_off=put_off) == []
    assert put_off == [other]
    assert [claimed.delivery for claimed in claim(connection, put_off, "me", 15, put_off=[])] == [other]


def test_a_claim_is_limited_by_bytes(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes rows until their payloads reach the limit, at least one, and leaves the others to the next claim."""
    monkeypatch.setattr("outbox_worker.claim.MAX_BYTES", 1000)
    payload = f'{{"text": "{"x" * 600}"}}'
    deliveries = [add_row(connection, payload=payload) for _ in range(5)]
    left, parts = deliveries, []
    with capture_logs() as lines:
        while left:
            put_off: list[Delivery] = []
            parts.append([claimed.delivery for claimed in claim(connection, left, "me", 15, put_off=put_off)])
            left = put_off
    assert parts == [deliveries[:2], deliveries[2:4], deliveries[4:]]
    assert {row["attempts"] for row in connection.execute("SELECT attempts FROM outbox")} == {1}
    assert lines == []
