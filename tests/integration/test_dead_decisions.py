"""`outbox dead retry`, `discard` and `give-up` change rows."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from outbox.cli import dead_letters
from outbox.queries import query
from outbox.rq_jobs import Delivery
from outbox.runtime import postgres
from outbox_worker.claim import claim
from tests.conftest import Connection
from tests.support.dead_rows import MAX_ID, RunDead, add_dead_row, rows_by_id, status_of
from tests.support.waiting import eventually


def test_a_retried_row_starts_afresh(connection: Connection, run_dead: RunDead) -> None:
    """It is pending and due now, without attempts, and keeps its delivery and its last error."""
    row_id, other = add_dead_row(connection), add_dead_row(connection)
    before = rows_by_id(connection)
    assert run_dead("retry", row_id) == (0, "retried 1 dead row\n", "")
    after = rows_by_id(connection)
    fresh = {"status": "pending", "attempts": 0, "worker": None, "due_now": True, "run_at": after[row_id]["run_at"]}
    assert after[row_id] == {**before[row_id], **fresh}
    assert after[other] == before[other]


def test_a_retried_row_is_claimed_only_with_its_next_delivery(connection: Connection, run_dead: RunDead) -> None:
    """The relay hands it over with the next delivery; a job of the old one claims nothing. The attempt is the first."""
    row_id = add_dead_row(connection)
    run_dead("retry", row_id)
    parameters = {"queue": "default", "window": 100, "horizon": 0.0, "batch": 10, "room": None}
    parameters |= {"payload_limit": 9, "left_out": []}
    (published,) = connection.execute(query("publish"), parameters).fetchall()
    assert (published["id"], published["delivery"], published["scheduled"]) == (row_id, 4, False)
    assert claim(connection, [Delivery(row_id, 3)], "w2", 15) == []
    (claimed,) = claim(connection, [Delivery(row_id, 4)], "w2", 15)
    assert (claimed.attempt, claimed.max_retries) == (1, 3)
    assert rows_by_id(connection)[row_id]["attempts"] == 1


def test_a_retry_wakes_the_relays_after_its_commit(connection: Connection, run_dead: RunDead) -> None:
    """A relay that gets the hint sees the row. A retry that changes nothing sends no hint."""
    row_id, done = add_dead_row(connection), add_dead_row(connection, status="done")
    connection.execute(query("listen"))
    run_dead("retry", done)
    connection.execute("NOTIFY outbox, 'nothing was retried'")
    run_dead("retry", row_id)
    hints = [notification.payload for notification in connection.notifies(timeout=10, stop_after=2)]
    assert hints == ["nothing was retried", ""]
    assert status_of(connection, row_id) == "pending"


@pytest.mark.parametrize(("verb", "becomes"), [("retry", "pending"), ("discard", None)])
def test_rows_that_are_not_dead_are_reported_and_the_others_changed(
    connection: Connection, run_dead: RunDead, verb: str, becomes: str | None
) -> None:
    """The error names each with its status, and they do not change; the exit code is 1. An id may be given twice."""
    dead_ids = [add_dead_row(connection), add_dead_row(connection)]
    others = {add_dead_row(connection, status=status): status for status in ("pending", "enqueued", "running", "done")}
    before = rows_by_id(connection)
    result = run_dead(verb, *others, *dead_ids, MAX_ID, dead_ids[0])
    expected = ", ".join(f"row {row_id} is {status}" for row_id, status in others.items())
    done = {"retry": "retried", "discard": "discarded"}[verb]
    assert result == (1, f"{done} 2 dead rows\n", f"not dead: {expected}, row {MAX_ID} does not exist\n")
    assert [status_of(connection, row_id) for row_id in dead_ids] == [becomes] * 2
    after = rows_by_id(connection)
    assert {row_id: after[row_id] for row_id in others} == {row_id: before[row_id] for row_id in others}

    again = add_dead_row(connection)
    result = run_dead(verb, MAX_ID, again, *list(others)[:1], "--json")
    assert result.code == 1
    assert json.loads(result.out) == {
        done: [again],
        "not_dead": [{"id": next(iter(others)), "status": "pending"}, {"id": MAX_ID, "status": None}],
    }
    assert run_dead(verb, MAX_ID) == (1, "", f"not dead: row {MAX_ID} does not exist\n")


def test_retry_all_retries_every_dead_row_or_those_of_a_task(
    connection: Connection, run_dead: RunDead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works in batches. Without dead rows it says so and exits with 0."""
    monkeypatch.setattr(dead_letters, "BATCH", 2)
    done = add_dead_row(connection, status="done")
    row_ids = [add_dead_row(connection) for _ in range(5)]
    others = [add_dead_row(connection, task="other") for _ in range(3)]
    assert run_dead("retry", "--all", "--task", "send") == (0, "retried 5 dead rows\n", "")
    assert {status_of(connection, row_id) for row_id in row_ids} == {"pending"}
    assert {status_of(connection, row_id) for row_id in others} == {"dead"}
    assert run_dead("retry", "--all", "--task", "send") == (0, "there are no dead rows of task 'send'\n", "")
    result = run_dead("retry", "--all", "--json")
    assert (result.code, json.loads(result.out)) == (0, {"retried": others, "not_dead": []})
    assert run_dead("retry", "--all") == (0, "there are no dead rows\n", "")
    result = run_dead("retry", "--all", "--json")
    assert (result.code, json.loads(result.out)) == (0, {"retried": [], "not_dead": []})
    assert status_of(connection, done) == "done"


def test_a_row_that_two_operators_retry_is_retried_once(connection: Connection, database_url: str) -> None:
    """The second waits for the first and then finds that the row is not dead."""
    row_id = add_dead_row(connection)
    with (
        postgres.connect(database_url, "first") as first,
        postgres.connect(database_url, "second") as second,
        ThreadPoolExecutor(1) as thread,
    ):
        with first.transaction():
            assert dead_letters.retry(first, [row_id]) == [row_id]
            waiting = thread.submit(dead_letters.retry, second, [row_id])
            _await_lock_wait(connection, "second")
        assert waiting.result(10) == []


@pytest.mark.parametrize(("command", "becomes"), [(dead_letters.retry, "pending"), (dead_letters.discard, None)])
def test_each_batch_is_a_transaction(
    connection: Connection,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[[Connection, list[int]], list[int]],
    becomes: str | None,
) -> None:
    """While the last batch waits for a lock, the batches before it are committed."""
    monkeypatch.setattr(dead_letters, "BATCH", 2)
    row_ids = [add_dead_row(connection) for _ in range(5)]
    with (
        postgres.connect(database_url, "other") as other,
        postgres.connect(database_url, "operator") as own,
        ThreadPoolExecutor(1) as thread,
    ):
        with other.transaction():
            other.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", [row_ids[4]])
            done = thread.submit(command, own, row_ids)
            _await_lock_wait(connection, "operator")
            assert [status_of(connection, row_id) for row_id in row_ids] == [becomes] * 4 + ["dead"]
        assert done.result(10) == row_ids


def _await_lock_wait(connection: Connection, name: str) -> None:
    eventually(
        lambda: connection.execute(
            "SELECT FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock'", [name]
        ).fetchall(),
        what=f"{name} waits for a lock",
    )


def test_a_discarded_row_is_gone(connection: Connection, run_dead: RunDead) -> None:
    """It is deleted without a question, and the others stay."""
    row_id, other = add_dead_row(connection), add_dead_row(connection)
    assert run_dead("discard", row_id) == (0, "discarded 1 dead row\n", "")
    assert list(rows_by_id(connection)) == [other]
    result = run_dead("discard", other, "--json")
    assert (result.code, json.loads(result.out)) == (0, {"discarded": [other], "not_dead": []})


def test_rows_that_no_worker_can_handle_are_given_up(
    connection: Connection, run_dead: RunDead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one task, or all, become dead; rows that a worker handles or holds do not."""
    monkeypatch.setattr(dead_letters, "BATCH", 2)
    statuses = ["pending", "pending", "enqueued", "running"]
    row_ids = [add_dead_row(connection, task="new", status=status, last_error="no handler") for status in statuses]
    other = add_dead_row(connection, task="other", status="pending")
    connection.execute("UPDATE outbox SET unhandled_since = now()")
    handled = add_dead_row(connection, task="new", status="pending")
    assert run_dead("give-up", "--task", "new\x1b") == (0, "gave up 0 rows of task 'new\\x1b'\n", "")
    assert run_dead("give-up", "--task", "new") == (0, "gave up 3 rows of task 'new'\n", "")
    after = rows_by_id(connection)
    assert [after[row_id]["status"] for row_id in row_ids] == ["dead", "dead", "dead", "running"]
    assert after[row_ids[0]]["last_error"] == "no handler"
    assert (after[other]["status"], after[handled]["status"]) == ("pending", "pending")
    result = run_dead("give-up", "--all", "--json")
    assert (result.code, json.loads(result.out)) == (0, {"given_up": [other]})
    assert run_dead("retry", row_ids[0]).code == 0
    assert run_dead("give-up", "--all").out == "gave up 0 rows\n", "no worker has given back the retried row yet"
