"""The worker's loop against a Redis in which strangers write, servers that come and go, and signals."""

import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest
import redis
from rq.job import Job
from rq.queue import Queue
from structlog.testing import capture_logs

from outbox import Context, Handler, Task
from outbox.devstack.embedded import EmbeddedServer
from outbox.rq_jobs import Delivery
from outbox.runtime import postgres, redis_connection
from outbox.runtime.settings import WorkerSettings
from outbox.runtime.stop import Stop
from outbox_worker.claim import Claim, claim
from outbox_worker.complete import Completer
from outbox_worker.errors import OverdueError, ThreadEndedError
from outbox_worker.in_flight import InFlight
from outbox_worker.queues import Queues, Suspended
from outbox_worker.worker import LEAVING_TIME, Worker
from tests.conftest import Connection
from tests.support.processes import Process, Stack, command_of, frozen, take_down
from tests.support.rows import add_row, offer, read_row
from tests.support.tasks import Nothing
from tests.support.waiting import eventually

HANDLERS = '''
"""Handlers of a test."""
import sys, threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydantic import BaseModel
from outbox import Context, Task, handler

class Note(BaseModel):
    does: str = "returns"
    path: str = ""

@handler(Task("noted", Note))
def noted(payload: Note, context: Context) -> None:
    if payload.does == "exits":
        sys.exit(1)
    if payload.does == "interrupts":
        raise KeyboardInterrupt
    if payload.does == "waits":
        Path(payload.path).touch()
        while not Path(payload.path + ".go").exists():
            threading.Event().wait(0.02)
    if payload.does == "waits for a thread":
        with ThreadPoolExecutor(1) as pool:
            Path(payload.path).touch()
            pool.submit(threading.Event().wait).result()
    with context.database.connection() as connection:
        connection.execute("SELECT 1")
'''


@pytest.fixture
def stack(stack: Stack, tmp_path: Path) -> Stack:
    """A stack whose workers know the task `noted`."""
    (tmp_path / "handlers_of_the_test.py").write_text(HANDLERS)
    stack.environment |= {
        "OUTBOX_HANDLERS": "handlers_of_the_test",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())]),
        "OUTBOX_LEASE": "1",
    }
    return stack


def is_done(connection: Connection, delivery: Delivery) -> bool:
    """Whether the row is done."""
    return bool(read_row(connection, delivery)["status"] == "done")


class Trap:
    """What creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_nothing_foreign_runs_or_stops_anything(
    stack: Stack, connection: Connection, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Strangers' jobs, ids and keys cost a log line each; the next real job is handled; no pickle is ever loaded."""
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    real = [add_row(connection) for _ in range(3)]
    done = add_row(connection, status="done")
    older = add_row(connection, delivery=5)
    foreign = Queue("critical", connection=redis_client).enqueue(os.mkdir, str(sprung))
    stranger = Job.create(os.mkdir, args=(str(sprung),), connection=redis_client, id="stranger")
    stranger.save()
    garbage = [b"stranger", trap[:100], b"", b"\xff\xfe\0", b"-1-1", b"1-1-1", b"0-1", f"{2**63}-1".encode()]
    offer(redis_client, *garbage, b"x" * 10_000_000, b"7" * 10_000_000, queue="critical")
    nowhere = [f"{2**63 - 1}-1", f"{done.row_id}-1", f"{older.row_id}-4", f"{older.row_id}-6"]
    offer(redis_client, *nowhere, *nowhere, real[0].job_id, queue="critical")
    redis_client.hset(f"rq:job:{real[0].job_id}", mapping={"data": trap, "origin": trap, "timeout": "garbage"})
    redis_client.set(f"rq:job:{real[1].job_id}", trap)  # no hash at all
    redis_client.set("rq:queue:default", trap)
    redis_client.set("rq:workers", trap)

    worker = stack.run("worker")
    eventually(lambda: is_done(connection, real[0]), 10, "the real job behind all that")
    eventually(lambda: worker.events("deleted key"), 5, "the stranger's key is gone")
    offer(redis_client, real[1].job_id)
    eventually(lambda: is_done(connection, real[1]), 10, "a real job in the queue that was a stranger's")
    offer(redis_client, *garbage, real[2].job_id)
    eventually(lambda: is_done(connection, real[2]), 10, "a job that was waited for")

    assert not sprung.exists()
    dropped = [line["job"] for line in worker.events("dropped job")]
    assert len([job for job in dropped if "stranger" in job]) == 2
    assert {*nowhere} <= {*dropped}
    assert all(len(line) < 2000 for line in worker.text().splitlines()), "no log line holds what a stranger wrote"
    assert len(dropped) == 8 + 2 + 4 + 8, "one line for each"
    assert redis_client.lrange("outbox:foreign:rq:queue:critical", 0, -1) == [foreign.id.encode()]
    assert worker.stop() == 0
    assert "Traceback" not in worker.text()
    assert read_row(connection, older)["status"] == "enqueued"


def test_a_job_leaves_nothing_behind(redis_client: redis.Redis) -> None:
    """Its hash goes with its id, whether it was there already or was waited for."""
    queues = Queues(redis_client, {"critical": 10, "default": 5})
    takes: list[Callable[[], list[Delivery]]] = [lambda: queues.take(3), queues.wait]
    for take in takes:
        redis_client.hset("rq:job:1-1", "data", "x")
        offer(redis_client, "1-1")
        assert take() == [Delivery(1, 1)]
        assert redis_client.keys("rq:job:*") == []


def test_both_queues_are_taken_by_weight(redis_client: redis.Redis) -> None:
    """With both full, critical and default are taken as 10 : 5, in any portions; an empty one costs nothing."""
    queues = Queues(redis_client, {"critical": 10, "default": 5})
    offer(redis_client, *[f"{n}-1" for n in range(1, 3001)], queue="critical")
    offer(redis_client, *[f"{n}-2" for n in range(1, 3001)], queue="default")
    for count in (1, 2, 4, 15, 32):
        taken = [delivery for _ in range(600 // count) for delivery in queues.take(count)]
        part = sum(delivery.number == 1 for delivery in taken) / len(taken)
        assert part == pytest.approx(2 / 3, abs=0.09), f"{count} at a time"
    redis_client.delete("rq:queue:critical")
    assert len(queues.take(32)) == 32


def test_a_stranger_key_does_not_hide_the_other_queue(redis_client: redis.Redis) -> None:
    """A queue's key of another type is removed and reported, and the other queue is taken from at once."""
    queues = Queues(redis_client, {"critical": 10, "default": 5})
    redis_client.hset("rq:queue:critical", "a", "b")
    offer(redis_client, "1-1")
    with capture_logs() as lines:
        assert queues.take(4) == [Delivery(1, 1)]
    assert [(line["event"], line["key"]) for line in lines] == [("deleted key", "rq:queue:critical")]


def test_a_suspended_queue_gives_nothing(redis_client: redis.Redis) -> None:
    """What is there stays there."""
    offer(redis_client, "1-1")
    redis_client.set("rq:suspended", 1)
    with pytest.raises(Suspended):
        Queues(redis_client, {"default": 5}).take(4)
    redis_client.delete("rq:suspended")
    assert redis_client.llen("rq:queue:default") == 1


def test_handlers_cannot_end_the_worker(stack: Stack, connection: Connection, redis_client: redis.Redis) -> None:
    """sys.exit() and KeyboardInterrupt in a handler are failures like others, even when there is only one slot."""
    rows = [add_row(connection, payload=f'{{"does": "{does}"}}') for does in ("exits", "interrupts", "returns")]
    offer(redis_client, *[row.job_id for row in rows])
    worker = stack.run("worker", OUTBOX_CONCURRENCY="1")
    eventually(lambda: is_done(connection, rows[2]), 10, "the handler that returns")
    for row, name in zip(rows, ("SystemExit", "KeyboardInterrupt"), strict=False):
        assert read_row(connection, row)["status"] == "pending"
        assert name in read_row(connection, row)["last_error"]
    assert worker.stop() == 0


def test_cut_connections_cost_no_attempt(stack: Stack, connection: Connection, redis_client: redis.Redis) -> None:
    """After Postgres has cut every connection, the next row is handled at its first attempt."""
    worker = stack.run("worker")
    first, second = add_row(connection), add_row(connection)
    offer(redis_client, first.job_id)
    eventually(lambda: is_done(connection, first))
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    offer(redis_client, second.job_id)
    eventually(lambda: is_done(connection, second), 10, "the second row")
    assert read_row(connection, second)["attempts"] == 1
    assert not worker.events("process task failed")


def waiting(
    stack: Stack,
    connection: Connection,
    client: redis.Redis,
    *,
    module: str = "worker",
    does: str = "waits",
    **environment: str,
) -> tuple[Process, Any, Path]:
    """Starts a worker with a handler that waits for a file, or for ever."""
    flag = stack.folder / "begun"
    row = add_row(connection, payload=f'{{"does": "{does}", "path": "{flag}"}}')
    offer(client, row.job_id)
    worker = stack.run(module, **environment)
    eventually(flag.exists, 10, "the handler has begun")
    return worker, row, flag.with_name("begun.go")


def overdue_worker(
    worker_settings: WorkerSettings,
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[[Nothing, Context], None],
    concurrency: int = 2,
) -> Worker:
    """Returns a worker of some threads that knows the task `hang`, and takes it for overdue half a second late."""
    monkeypatch.setattr("outbox_worker.in_flight.OVERTIME", 0.5)
    settings = worker_settings.model_copy(update={"concurrency": concurrency})
    return Worker(settings, {"hang": Handler(Task("hang", Nothing), function)}, Stop())


def waiting_for(may_end: threading.Event) -> Callable[[Nothing, Context], None]:
    """Returns a handler that ends when it may."""

    def wait(_: Nothing, __: Context) -> None:
        may_end.wait(30)

    return wait


def test_a_handler_that_hangs_ends_its_worker_once_the_others_have_ended(
    worker_settings: WorkerSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can end a thread. Its lease is kept, the others end first, and the attempt counts."""
    may_end, ended = threading.Event(), threading.Event()

    def hang(_: Nothing, context: Context) -> None:
        if context.row_id == hanging.row_id:
            may_end.wait(30)
        else:
            time.sleep(3)
            ended.set()

    worker = overdue_worker(worker_settings, monkeypatch, hang)
    hanging, slow = add_row(connection, task="hang", timeout=1), add_row(connection, task="hang", timeout=30)
    offer(worker._client, hanging.job_id, slow.job_id)
    with capture_logs() as lines, pytest.raises(OverdueError, match=f"rows {hanging.row_id} do not end"):
        worker._work()
    assert ended.is_set(), "it has waited for the other"
    assert read_row(connection, hanging)["status"] == "running", "the lease is kept while the handler runs"
    worker._finish()
    may_end.set()
    row = read_row(connection, hanging)
    assert (row["status"], row["attempts"]) == ("pending", 1)
    assert "did not end within" in row["last_error"]
    assert row["waits"] > LEAVING_TIME + 10, "it waits as after a failure"
    assert is_done(connection, slow)
    assert [line["row"] for line in lines if line["event"] == "attempt is overdue"] == [hanging.row_id]


def test_a_handler_that_hangs_at_every_attempt_is_dead_in_the_end(
    worker_settings: WorkerSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attempts count, so one worker after the other is not lost to it for ever."""
    may_end = threading.Event()
    row = add_row(connection, task="hang", timeout=1, max_retries=1)
    for attempts, status in ((1, "pending"), (2, "dead")):
        worker = overdue_worker(worker_settings, monkeypatch, waiting_for(may_end))
        offer(worker._client, row.job_id)
        with pytest.raises(OverdueError):
            worker._work()
        worker._finish()
        assert (read_row(connection, row)["status"], read_row(connection, row)["attempts"]) == (status, attempts)
        connection.execute("UPDATE outbox SET status = 'enqueued', run_at = now() WHERE status = 'pending'")
    may_end.set()


def test_a_handler_that_ends_late_costs_the_worker_nothing(
    worker_settings: WorkerSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it did is done. The worker takes new rows again afterwards, and is on RQ's list all the time."""
    may_end = threading.Event()
    worker = overdue_worker(worker_settings, monkeypatch, waiting_for(may_end), concurrency=3)
    row, later = add_row(connection, task="hang", timeout=1), add_row(connection, task="hang", timeout=30)
    other = add_row(connection, task="hang", timeout=30)
    offer(worker._client, row.job_id, other.job_id)
    working = threading.Thread(target=worker._work)
    with capture_logs() as lines:
        working.start()
        eventually(lambda: any(line["event"] == "attempt is overdue" for line in lines), 10, "it takes nothing new")
    offer(worker._client, later.job_id)
    worker._client.delete(worker._registration.key)
    worker._registration.forget()  # as HEARTBEAT_INTERVAL later
    eventually(lambda: worker._client.exists(worker._registration.key), 5, "RQ still lists it")
    assert read_row(connection, later)["status"] == "enqueued", "nothing new is taken"
    may_end.set()
    eventually(lambda: all(is_done(connection, each) for each in (row, other, later)), 10, "all are done")
    worker._stop.request()
    working.join(10)
    worker._finish()


def test_a_row_that_redis_has_twice_runs_once(
    worker_settings: WorkerSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows are claimed one by one, because an earlier claim got no answer."""
    ran: list[int] = []

    def count(_: Nothing, context: Context) -> None:
        ran.append(context.row_id)
        time.sleep(0.2)

    worker = overdue_worker(worker_settings, monkeypatch, count)
    row = add_row(connection, task="hang")
    worker._claimer._may_have_claimed = True
    offer(worker._client, row.job_id, row.job_id)
    working = threading.Thread(target=worker._work)
    working.start()
    eventually(lambda: is_done(connection, row), 10)
    worker._stop.request()
    working.join(10)
    worker._finish()
    assert ran == [row.row_id]


def losing_claims(worker: Worker, monkeypatch: pytest.MonkeyPatch, lost: Callable[[], object]) -> None:
    """Has the worker's first claim be committed, and its answer lost."""

    def claim_and_lose(*arguments: Any, **options: Any) -> list[Claim]:
        monkeypatch.setattr("outbox_worker.claimer.claim", claim)
        assert claim(*arguments, **options)
        lost()
        raise psycopg.OperationalError("the answer is lost")

    monkeypatch.setattr("outbox_worker.claimer.claim", claim_and_lose)


def test_what_was_claimed_without_an_answer_is_given_back_at_the_end(
    worker_settings: WorkerSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is stopped before it can ask again: the row has not begun, and loses no attempt."""
    row = add_row(connection, task="hang", max_retries=0)
    worker = overdue_worker(worker_settings, monkeypatch, lambda *_: None)
    losing_claims(worker, monkeypatch, worker._stop.request)
    offer(worker._client, row.job_id)
    worker._work()
    worker._finish()
    now = read_row(connection, row)
    assert (now["status"], now["attempts"]) == ("pending", 0)


def test_what_was_claimed_without_an_answer_and_locked_then_is_given_back(
    worker_settings: WorkerSettings, database_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another session has the row locked when the worker asks again: it goes back once the lock is gone.

    The row behind it is begun meanwhile.
    """
    row, behind = add_row(connection, task="hang", max_retries=0), add_row(connection, task="hang", max_retries=0)
    worker = overdue_worker(worker_settings, monkeypatch, lambda *_: None)
    with postgres.connect(database_url, "test") as other:
        locks = other.transaction()

        def lock() -> None:
            locks.__enter__()
            other.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", [row.row_id])

        losing_claims(worker, monkeypatch, lock)
        offer(worker._client, row.job_id, behind.job_id)
        working = threading.Thread(target=worker._work)
        with capture_logs() as lines:
            working.start()
            eventually(lambda: [line for line in lines if "claim" in line["event"]], 10, "it has met the lock")
            eventually(lambda: is_done(connection, behind), 10, "it does not wait for the lock")
            assert read_row(connection, row)["status"] == "running"
            locks.__exit__(None, None, None)
            eventually(lambda: read_row(connection, row)["status"] == "pending", 10, "it is given back")
        assert read_row(connection, row)["attempts"] == 0
        worker._stop.request()
        working.join(10)
        worker._finish()


def test_a_copy_of_a_job_whose_claim_is_lost_gives_back_no_row_that_runs(
    worker_settings: WorkerSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis has the job twice, and the copy's claim gets no answer: the row stays with its handler."""
    ran: list[int] = []
    may_end = threading.Event()

    def wait(_: Nothing, context: Context) -> None:
        ran.append(context.attempt)
        may_end.wait(30)

    row = add_row(connection, task="hang", timeout=60)
    worker = overdue_worker(worker_settings, monkeypatch, wait)
    offer(worker._client, row.job_id)
    working = threading.Thread(target=worker._work)
    with capture_logs() as lines:
        working.start()
        eventually(lambda: ran, 10)

        def lose(*_: Any, **__: Any) -> NoReturn:
            monkeypatch.setattr("outbox_worker.claimer.claim", claim)
            raise psycopg.OperationalError("the answer is lost")

        monkeypatch.setattr("outbox_worker.claimer.claim", lose)
        offer(worker._client, row.job_id)
        eventually(lambda: [line for line in lines if line["event"] == "dropped job"], 10, "the copy is dropped")
        later = add_row(connection, task="unheard_of")
        offer(worker._client, later.job_id)
        eventually(lambda: read_row(connection, later)["status"] != "enqueued", 10, "outcomes are written meanwhile")
        assert read_row(connection, row)["status"] == "running"
    may_end.set()
    eventually(lambda: is_done(connection, row), 10)
    worker._stop.request()
    working.join(10)
    worker._finish()
    assert ran == [1]


def test_a_long_handler_keeps_its_row(stack: Stack, connection: Connection, redis_client: redis.Redis) -> None:
    """Its lease of one second is renewed while it runs for three; SIGTERM then lets it end, and the exit code is 0."""
    worker, row, go = waiting(stack, connection, redis_client)
    later = read_row(connection, row)["lease_until"] + timedelta(seconds=3)
    eventually(lambda: read_row(connection, row)["lease_until"] > later, 10, "it is renewed again and again")
    untouched = add_row(connection)
    worker.send(signal.SIGTERM)
    go.touch()
    assert worker.wait(10) == 0
    assert is_done(connection, row)
    assert read_row(connection, row)["attempts"] == 1
    assert read_row(connection, untouched)["status"] == "enqueued"


def test_a_second_sigterm_gives_the_row_back(stack: Stack, connection: Connection, redis_client: redis.Redis) -> None:
    """More than a second after the first, it ends the worker at once; the row is pending, and its attempt counts.

    It may be had when the worker has exited, and not before: its handler still runs until then.
    """
    worker, row, _ = waiting(stack, connection, redis_client)
    worker.send(signal.SIGTERM)
    worker.send(signal.SIGTERM)
    asked = time.monotonic()

    def has_waited() -> bool:
        assert worker.is_up(), "two at once are one"
        assert read_row(connection, row)["status"] == "running"
        return time.monotonic() - asked > 2  # the worker may have heard the first a moment later

    eventually(has_waited)
    asked = time.monotonic()
    worker.send(signal.SIGTERM)
    assert worker.wait(5) == 0
    now = read_row(connection, row)
    assert (now["status"], now["attempts"], now["lease"]) == ("pending", 1, None)
    assert LEAVING_TIME - (time.monotonic() - asked) < now["waits"] <= LEAVING_TIME
    assert now["last_error"] == "the worker was stopped before the attempt ended"


def test_a_handler_that_outlives_the_grace_holds_up_no_end(
    stack: Stack, connection: Connection, redis_client: redis.Redis
) -> None:
    """It has started a thread that the interpreter would wait for as it shuts down, after the row was given back."""
    worker, row, _ = waiting(stack, connection, redis_client, does="waits for a thread", OUTBOX_GRACE="0.1")
    worker.send(signal.SIGTERM)
    eventually(lambda: worker.events("stopped"), 10)
    assert read_row(connection, row)["status"] == "pending"
    assert worker.wait(5) == 0


def test_rows_are_given_back_where_no_thread_can_be_started(
    stack: Stack, connection: Connection, redis_client: redis.Redis
) -> None:
    """A limit of processes counts threads: the rows that were claimed have not begun, and lose no attempt."""
    worker = stack.run("tests.support.threadless", THREADLESS="worker")
    eventually(lambda: redis_client.scard("rq:workers"), 20, "it takes rows, and has the threads for its marks")
    worker.send(signal.SIGUSR1)
    rows = [add_row(connection) for _ in range(7)]
    offer(redis_client, *(row.job_id for row in rows))
    assert worker.wait(10) == 1
    now = [read_row(connection, row) for row in rows]
    assert {row["attempts"] for row in now} == {0}
    assert "pending" in {row["status"] for row in now} <= {"pending", "enqueued"}, "it may not have taken all"
    assert "no thread can be started to run handlers" in worker.text()
    assert "Traceback" not in worker.text()


def test_sigterm_is_obeyed_where_no_thread_can_be_started(
    stack: Stack, connection: Connection, redis_client: redis.Redis
) -> None:
    """What runs may end, is marked, and the exit code is 0."""
    worker, row, go = waiting(stack, connection, redis_client, module="tests.support.threadless", THREADLESS="worker")
    worker.send(signal.SIGUSR1)
    worker.send(signal.SIGTERM)
    go.touch()
    assert worker.wait(10) == 0
    assert is_done(connection, row)
    assert "Traceback" not in worker.text()


def test_redis_away_at_the_start_and_later(stack: Stack, connection: Connection, own_redis: EmbeddedServer) -> None:
    """The worker waits for Redis, says so once, and works when it is there."""
    take_down(own_redis)
    worker = stack.start("worker", REDIS_URL=own_redis.url)
    worker.await_event("Redis is away")
    row = add_row(connection)
    own_redis.restart()
    worker.await_event("Redis is back")
    with redis_connection.connect(own_redis.url, "test") as client:
        offer(client, row.job_id)
    eventually(lambda: is_done(connection, row), 10, "the row")
    assert len(worker.events("Redis is away")) == 1
    assert worker.stop() == 0


def test_a_redis_that_hangs_is_away_and_holds_up_no_end(
    stack: Stack, connection: Connection, own_redis: EmbeddedServer
) -> None:
    """A worker notices it within seconds, and SIGTERM ends it in time: what runs is given back, Redis or no Redis."""
    row = add_row(connection, payload=f'{{"does": "waits", "path": "{stack.folder / "begun"}"}}')
    with redis_connection.connect(own_redis.url, "test") as client:
        offer(client, row.job_id)
        worker = stack.run("worker", REDIS_URL=own_redis.url, OUTBOX_GRACE="12")
        eventually((stack.folder / "begun").exists, 10, "the handler has begun")
    with frozen(own_redis):
        worker.await_event("Redis is away", 15)
        worker.send(signal.SIGTERM)
        assert worker.wait(12 + 5) == 0, worker.text()
    assert read_row(connection, row)["status"] == "pending"
    assert read_row(connection, row)["attempts"] == 1


def test_a_claim_that_waits_for_a_lock_holds_up_no_other(
    stack: Stack, connection: Connection, database_url: str, redis_client: redis.Redis
) -> None:
    """The row that somebody has locked is left to the sweep; those that come with it, and later, are done.

    Postgres is not away then: the connection is kept.
    """
    locked, behind, later = [add_row(connection) for _ in range(3)]
    with postgres.connect(database_url, "test") as stranger, stranger.transaction():
        stranger.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", [locked.row_id])
        offer(redis_client, locked.job_id, behind.job_id)
        worker = stack.run("worker")
        worker.await_event("claim timed out waiting for a row lock")
        offer(redis_client, later.job_id)
        eventually(lambda: is_done(connection, behind) and is_done(connection, later), 5, "the other rows")
        assert read_row(connection, locked)["status"] == "enqueued"
    assert not worker.events("Postgres is away")
    assert worker.stop() == 0


def test_a_suspension_is_told_of(stack: Stack, connection: Connection, redis_client: redis.Redis) -> None:
    """Whoever it was that suspended the workers, they say so, once, and when they go on."""
    row = add_row(connection)
    redis_client.set("rq:suspended", 1)
    offer(redis_client, row.job_id)
    worker = stack.run("worker")
    worker.await_event("suspended")
    redis_client.delete("rq:suspended")
    eventually(lambda: is_done(connection, row), 10, "the row")
    worker.await_event("resumed")
    assert [len(worker.events(event)) for event in ("suspended", "resumed")] == [1, 1]
    assert worker.stop() == 0


def test_postgres_away_at_the_start(stack: Stack, own_postgres: EmbeddedServer, redis_client: redis.Redis) -> None:
    """The worker waits for Postgres, says so once, and works when it is there."""
    with postgres.connect(own_postgres.url, "test") as connection:
        row = add_row(connection)
    take_down(own_postgres)
    offer(redis_client, row.job_id)
    worker = stack.start("worker", DATABASE_URL=own_postgres.url)
    worker.await_event("Postgres is away")
    own_postgres.restart()
    worker.await_event("Postgres is back")
    with postgres.connect(own_postgres.url, "test") as connection:
        eventually(lambda: is_done(connection, row), 10, "the row")
    assert len(worker.events("Postgres is away")) == 1
    assert worker.stop() == 0


def test_nothing_is_claimed_that_could_not_be_marked(worker_settings: WorkerSettings, connection: Connection) -> None:
    """A worker that can claim and not mark would send mail after mail; it takes nothing until it can."""
    row = add_row(connection)
    worker = Worker(worker_settings, {}, Stop())
    healthy, worker._completer = (
        worker._completer,
        Completer("postgresql://nobody@/none?host=/nowhere", InFlight(), "me", 15),
    )
    offer(worker._client, row.job_id)
    worker._completer.start()
    eventually(lambda: worker._completer._failures > 1, 5, "the completer has tried")
    assert worker._take() == []
    worker._completer = healthy
    healthy.start()
    assert eventually(worker._take, 5, "it takes the job") == [row]
    healthy.close(5)
    worker._registration.close()


def test_a_worker_that_must_fail_ends_what_it_runs(
    stack: Stack, connection: Connection, redis_client: redis.Redis
) -> None:
    """Back at a database that is not migrated any more, it ends, marks and signs off in order before it fails."""
    worker, row, go = waiting(stack, connection, redis_client)
    connection.execute("DELETE FROM _yoyo_migration")
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'outbox worker claims' AND datname = current_database()"
    )
    offer(redis_client, add_row(connection).job_id)  # it notices at its next claim
    eventually(lambda: worker.events("Postgres is away"), 10, "it has lost its connection")
    assert worker.is_up(), "the handler still runs"
    go.touch()
    assert worker.wait(20) == 1
    assert "run 'outbox migrate'" in worker.text()
    assert "Traceback" not in worker.text()
    assert is_done(connection, row)
    assert [line["cut_short"] for line in worker.events("stopped")] == [0]
    assert not redis_client.smembers("rq:workers"), "it is off RQ's list"


def test_a_worker_whose_marker_has_ended_ends(
    worker_settings: WorkerSettings, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a second it takes nothing new and ends with an error, so that its supervisor starts another."""
    worker = Worker(worker_settings, {"noted": Handler(Task("noted", Nothing), lambda *_: None)}, Stop())
    first, second = add_row(connection), add_row(connection)

    def end(_: Connection) -> None:
        if worker._completer.in_flight.deliveries():
            raise SystemExit("no memory for it")

    monkeypatch.setattr(worker._completer, "_write", end)
    offer(worker._client, first.job_id)
    with capture_logs() as lines, ThreadPoolExecutor(1) as thread:
        running = thread.submit(worker.run)
        eventually(lambda: worker._completer._failure, 10, "the completer's thread has ended")
        ended = time.monotonic()
        offer(worker._client, second.job_id)
        with pytest.raises(ThreadEndedError, match="no memory for it"):
            running.result(20)
        assert time.monotonic() - ended < 3
    assert read_row(connection, second)["status"] == "enqueued"
    assert [line["rows"] for line in lines if line["event"] == "outcomes lost at shutdown"] == [[first.row_id]]


def test_a_log_that_nobody_reads_holds_up_no_row(
    stack: Stack, connection: Connection, redis_client: redis.Redis
) -> None:
    """Its pipe is full after some hundred lines: rows are marked and leases renewed all the same."""
    rows = [add_row(connection, payload=f'{{"path": "{"x" * 500}"}}') for _ in range(1000)]
    environment = {**os.environ, **stack.environment, "LOG_FORMAT": "json"}
    offer(redis_client, *[row.job_id for row in rows])
    with subprocess.Popen(command_of("worker"), env=environment, stdout=subprocess.PIPE) as worker:
        try:
            undone = "SELECT FROM outbox WHERE status <> 'done' LIMIT 1"
            eventually(lambda: not connection.execute(undone).fetchall(), 30, "all rows are done")
            worker.terminate()
            assert worker.wait(15) == 0
        finally:
            worker.kill()
    assert connection.execute("SELECT max(attempts) AS most FROM outbox").fetchone() == {"most": 1}


def test_a_row_that_cannot_be_claimed_ends_no_worker(
    stack: Stack, connection: Connection, redis_client: redis.Redis
) -> None:
    """A trigger refuses its claim: it is named, and those that came with it are done."""
    rows = [add_row(connection) for _ in range(5)]
    refused = rows[2]
    connection.execute(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$;
        CREATE TRIGGER refusing BEFORE UPDATE ON outbox FOR EACH ROW WHEN (NEW.id = {refused.row_id})
        EXECUTE FUNCTION refuse();
        """
    )
    offer(redis_client, *[row.job_id for row in rows])
    worker = stack.run("worker")
    eventually(lambda: all(is_done(connection, row) for row in rows if row != refused), 10, "the others are done")
    assert worker.await_event("rows cannot be claimed")["rows"] == [refused.row_id]
    assert worker.stop() == 0
