"""The worker's loop: foreign keys and jobs in Redis, servers that come and go, and rows that cannot be claimed."""

import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import redis
from rq.job import Job
from rq.queue import Queue

from outbox.devstack.embedded import EmbeddedServer
from outbox.rq_jobs import Delivery
from outbox.runtime import postgres, redis_connection
from outbox.runtime.settings import WorkerSettings
from outbox.runtime.stop import Stop
from outbox_worker.complete import Completer
from outbox_worker.in_flight import InFlight
from outbox_worker.worker import Worker
from tests.conftest import Connection
from tests.support.processes import Stack, command_of, take_down
from tests.support.rows import add_row, offer, read_row
from tests.support.triggers import refuse_updates
from tests.support.waiting import eventually
from tests.support.workers import is_done


class Trap:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_foreign_jobs_and_keys_neither_run_nor_stop_a_worker(
    noted_stack: Stack, connection: Connection, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Each foreign job, id and key is one log line; the next real job is handled; no pickle is loaded."""
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    real = [add_row(connection) for _ in range(3)]
    done = add_row(connection, status="done")
    older = add_row(connection, delivery=5)
    foreign = Queue("critical", connection=redis_client).enqueue(os.mkdir, str(sprung))
    Job.create(os.mkdir, args=(str(sprung),), connection=redis_client, id="saved").save()
    garbage = [b"saved", trap[:100], b"", b"\xff\xfe\0", b"-1-1", b"1-1-1", b"0-1", f"{2**63}-1".encode()]
    offer(redis_client, *garbage, b"x" * 10_000_000, b"7" * 10_000_000, queue="critical")
    stale = [f"{2**63 - 1}-1", f"{done.row_id}-1", f"{older.row_id}-4", f"{older.row_id}-6"]
    offer(redis_client, *stale, *stale, real[0].job_id, queue="critical")
    redis_client.hset(f"rq:job:{real[0].job_id}", mapping={"data": trap, "origin": trap, "timeout": "garbage"})
    redis_client.set(f"rq:job:{real[1].job_id}", trap)  # not a hash
    redis_client.set("rq:queue:default", trap)
    redis_client.set("rq:workers", trap)

    worker = noted_stack.run("worker")
    eventually(lambda: is_done(connection, real[0]), 10, "the real job behind the others")
    eventually(lambda: worker.events("deleted key"), 5, "the foreign key is deleted")
    offer(redis_client, real[1].job_id)
    eventually(lambda: is_done(connection, real[1]), 10, "a real job in the queue whose key was foreign")
    offer(redis_client, *garbage, real[2].job_id)
    eventually(lambda: is_done(connection, real[2]), 10, "a job that the worker waits for")

    assert not sprung.exists()
    dropped = [line["job"] for line in worker.events("dropped job")]
    assert len([job for job in dropped if "saved" in job]) == 2
    assert {*stale} <= {*dropped}
    assert all(len(line) < 2000 for line in worker.text().splitlines()), "no log line has the foreign text"
    assert len(dropped) == 8 + 2 + 4 + 8, "one line for each"
    assert redis_client.lrange("outbox:foreign:rq:queue:critical", 0, -1) == [foreign.id.encode()]
    assert worker.stop() == 0
    assert "Traceback" not in worker.text()
    assert read_row(connection, older)["status"] == "enqueued"


def test_handlers_cannot_end_the_worker(noted_stack: Stack, connection: Connection, redis_client: redis.Redis) -> None:
    """sys.exit() and KeyboardInterrupt in a handler are failures like any other, also in a worker with one thread."""
    deliveries = [add_row(connection, payload=f'{{"does": "{does}"}}') for does in ("exits", "interrupts", "returns")]
    offer(redis_client, *[delivery.job_id for delivery in deliveries])
    worker = noted_stack.run("worker", OUTBOX_CONCURRENCY="1")
    eventually(lambda: is_done(connection, deliveries[2]), 10, "the handler that returns")
    for delivery, name in zip(deliveries, ("SystemExit", "KeyboardInterrupt"), strict=False):
        assert read_row(connection, delivery)["status"] == "pending"
        assert name in read_row(connection, delivery)["last_error"]
    assert worker.stop() == 0


def test_cut_connections_cost_no_attempt(noted_stack: Stack, connection: Connection, redis_client: redis.Redis) -> None:
    """After Postgres has cut every connection, the next row is handled at its first attempt."""
    worker = noted_stack.run("worker")
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


def test_redis_away_at_the_start(noted_stack: Stack, connection: Connection, own_redis: EmbeddedServer) -> None:
    """The worker waits for Redis, logs the outage once, and works when Redis is back."""
    take_down(own_redis)
    worker = noted_stack.start("worker", REDIS_URL=own_redis.url)
    worker.await_event("Redis is away")
    delivery = add_row(connection)
    own_redis.restart()
    worker.await_event("Redis is back")
    with redis_connection.connect(own_redis.url, "test") as client:
        offer(client, delivery.job_id)
    eventually(lambda: is_done(connection, delivery), 10, "the row")
    assert len(worker.events("Redis is away")) == 1
    assert worker.stop() == 0


def test_a_locked_row_does_not_delay_the_claims_of_others(
    noted_stack: Stack, connection: Connection, database_url: str, redis_client: redis.Redis
) -> None:
    """A row that another session has locked is left to the sweep; the rows taken with it and later are done.

    This is no outage of Postgres: the connection is kept.
    """
    locked, behind, later = [add_row(connection) for _ in range(3)]
    with postgres.connect(database_url, "test") as other, other.transaction():
        other.execute("SELECT FROM outbox WHERE id = %s FOR UPDATE", [locked.row_id])
        offer(redis_client, locked.job_id, behind.job_id)
        worker = noted_stack.run("worker")
        worker.await_event("claim timed out waiting for a row lock")
        offer(redis_client, later.job_id)
        eventually(lambda: is_done(connection, behind) and is_done(connection, later), 5, "the other rows")
        assert read_row(connection, locked)["status"] == "enqueued"
    assert not worker.events("Postgres is away")
    assert worker.stop() == 0


def test_a_suspension_is_logged(noted_stack: Stack, connection: Connection, redis_client: redis.Redis) -> None:
    """One line when the worker is suspended, and one when it is resumed."""
    delivery = add_row(connection)
    redis_client.set("rq:suspended", 1)
    offer(redis_client, delivery.job_id)
    worker = noted_stack.run("worker")
    worker.await_event("suspended")
    redis_client.delete("rq:suspended")
    eventually(lambda: is_done(connection, delivery), 10, "the row")
    worker.await_event("resumed")
    assert [len(worker.events(event)) for event in ("suspended", "resumed")] == [1, 1]
    assert worker.stop() == 0


def test_postgres_away_at_the_start(
    noted_stack: Stack, own_postgres: EmbeddedServer, redis_client: redis.Redis
) -> None:
    """The worker waits for Postgres, logs the outage once, and works when Postgres is back."""
    with postgres.connect(own_postgres.url, "test") as connection:
        delivery = add_row(connection)
    take_down(own_postgres)
    offer(redis_client, delivery.job_id)
    worker = noted_stack.start("worker", DATABASE_URL=own_postgres.url)
    worker.await_event("Postgres is away")
    own_postgres.restart()
    worker.await_event("Postgres is back")
    with postgres.connect(own_postgres.url, "test") as connection:
        eventually(lambda: is_done(connection, delivery), 10, "the row")
    assert len(worker.events("Postgres is away")) == 1
    assert worker.stop() == 0


def test_a_worker_that_cannot_complete_takes_nothing(worker_settings: WorkerSettings, connection: Connection) -> None:
    """A worker that could claim and not complete would send the same mails again and again."""
    delivery = add_row(connection)
    worker = Worker(worker_settings, {}, Stop())
    healthy, worker._completer = (
        worker._completer,
        Completer("postgresql://nobody@/none?host=/nowhere", InFlight(), "me", 15),
    )
    offer(worker._client, delivery.job_id)
    worker._completer.start()
    eventually(lambda: worker._completer._failures > 1, 5, "the completer has tried")
    assert worker._take() == []
    worker._completer = healthy
    healthy.start()
    assert eventually(worker._take, 5, "it takes the job") == [delivery]
    healthy.close(5)
    worker._registration.close()


def test_a_log_that_is_not_read_delays_no_row(
    noted_stack: Stack, connection: Connection, redis_client: redis.Redis
) -> None:
    """The pipe is full after some hundred lines: rows are still completed and leases renewed."""
    deliveries = [add_row(connection, payload=f'{{"path": "{"x" * 500}"}}') for _ in range(1000)]
    environment = {**os.environ, **noted_stack.environment, "LOG_FORMAT": "json"}
    offer(redis_client, *[delivery.job_id for delivery in deliveries])

    def are_done() -> bool:
        # As a relay does: on a busy machine the worker may give rows back because they have waited for a thread.
        given_back = connection.execute(
            "UPDATE outbox SET status = 'enqueued', run_at = now() WHERE status = 'pending' RETURNING id"
        ).fetchall()
        if given_back:
            offer(redis_client, *[Delivery(row["id"], 1).job_id for row in given_back])
        return not connection.execute("SELECT FROM outbox WHERE status <> 'done' LIMIT 1").fetchall()

    with subprocess.Popen(command_of("worker"), env=environment, stdout=subprocess.PIPE) as worker:
        try:
            eventually(are_done, 30, "all rows are done")
            worker.terminate()
            assert worker.wait(15) == 0
        finally:
            worker.kill()
    assert connection.execute("SELECT max(attempts) AS attempts FROM outbox").fetchone() == {"attempts": 1}


def test_a_row_that_cannot_be_claimed_does_not_delay_others(
    noted_stack: Stack, connection: Connection, redis_client: redis.Redis
) -> None:
    """A trigger refuses its claim: the row is logged, and the rows taken with it are done."""
    deliveries = [add_row(connection) for _ in range(5)]
    refused = deliveries[2]
    refuse_updates(connection, row_id=refused.row_id)
    offer(redis_client, *[delivery.job_id for delivery in deliveries])
    worker = noted_stack.run("worker")
    eventually(
        lambda: all(is_done(connection, delivery) for delivery in deliveries if delivery != refused),
        10,
        "the others are done",
    )
    assert worker.await_event("rows cannot be claimed")["rows"] == [refused.row_id]
    assert worker.stop() == 0
