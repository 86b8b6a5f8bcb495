"""Redis and the outbox hold foreign data: none of it runs, no process stops, and real users still get their mails."""

import math
import os
import pickle
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import redis
from psycopg.types.json import Jsonb
from rq import Queue
from rq.command import PUBSUB_CHANNEL_TEMPLATE
from rq_scheduler import Scheduler

from outbox.runtime import postgres, redis_connection
from tests.conftest import Connection
from tests.support.mailbox import Mailbox, serve_mailbox
from tests.support.processes import QUICK, Process, Stack, add_users
from tests.support.servers import with_database
from tests.support.waiting import eventually

pytestmark = pytest.mark.unmeasured

SCHEDULED = "rq:scheduler:scheduled_jobs"

GARBAGE_IDS = [
    b"",
    b"\x00\xff\xfe",
    b"x" * 100_000,
    b"12-",
    b"-1-1",
    b"0-0",
    b"1-0",
    b"1-1 ",
    b"1-1\n",
    b"9" * 40 + b"-1",
    b"9223372036854775808-1",
    b"9223372036854775807-1",
    b"1-2147483648",
    b"1-2147483647",
    "１-１".encode(),  # noqa: RUF001 - digits, but not ours
    b"../../etc/passwd",
    b'{"row": 1}',
    b"'; DROP TABLE outbox; --",
]


class Bomb:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        """Returns the call that loads it."""
        return os.mkdir, (str(self.folder),)


@dataclass
class Running:
    """The three processes, and real users."""

    stack: Stack
    processes: list[Process]
    connection: Connection
    redis: redis.Redis
    mailbox: Mailbox
    numbers: Iterator[int] = field(default_factory=count)

    def serves(self, users: int = 3) -> None:
        """Creates users, waits for exactly one mail each, and checks that no process has ended or crashed."""
        names = [f"real_{next(self.numbers)}" for _ in range(users)]
        assert [self.stack.create_user(name)[0] for name in names] == [201] * users
        eventually(lambda: all(self.mailbox.to(f"{name}@example.com") for name in names), 15, "the mails")
        eventually(lambda: not self.unfinished(), 10, "all rows are done or dead")
        assert [len(self.mailbox.to(f"{name}@example.com")) for name in names] == [1] * users
        for process in self.processes:
            assert process.is_up(), process.text()
            assert "Traceback" not in process.text()

    def unfinished(self) -> list[dict[str, Any]]:
        """Returns the sign-up rows that are neither done nor dead."""
        return self.connection.execute(
            "SELECT id FROM outbox WHERE status IN ('pending', 'enqueued', 'running') AND task = 'send_verify_email'"
        ).fetchall()


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory,
    create_database: Callable[[str | None], str],
    template: str,
    session_redis_url: str,
) -> Iterator[Running]:
    """The three processes, which must survive all tests of this file."""
    url = create_database(template)
    with (
        serve_mailbox() as mailbox,
        postgres.connect(url, "test") as connection,
        redis_connection.connect(session_redis_url, "test") as client,
    ):
        client.flushall()
        stack = Stack(tmp_path_factory.mktemp("hostile"), url, session_redis_url, mailbox.url)
        stack.environment |= QUICK
        try:
            yield Running(stack, stack.run_all("service", "relay", "worker"), connection, client, mailbox)
        finally:
            stack.close()
            client.flushall()


@pytest.fixture(autouse=True)
def emptied(running: Running) -> None:
    """Empties Redis before each test."""
    running.redis.flushall()


def test_garbage_in_the_queues_and_in_the_set(running: Running) -> None:
    """Ids that no relay wrote are dropped, in the queues and in the set, whatever their score."""
    running.serves(1)
    for queue in ("critical", "default"):
        running.redis.rpush(f"rq:queue:{queue}", *GARBAGE_IDS)
    for number, member in enumerate(GARBAGE_IDS):
        running.redis.zadd(SCHEDULED, {member: [-math.inf, 0, time.time(), time.time() + 0.5][number % 4]})
    running.redis.zadd(SCHEDULED, {"for ever": math.inf})

    running.serves()

    eventually(lambda: running.redis.zcard(SCHEDULED) <= 1, 5, "the due members have left the set")
    assert running.redis.llen("rq:queue:critical") == running.redis.llen("rq:queue:default") == 0


def test_ids_of_done_rows_and_old_deliveries(running: Running) -> None:
    """Jobs of done rows, and of past and future deliveries, send nothing."""
    running.serves(2)
    newest = running.connection.execute("SELECT max(id) AS id FROM outbox").fetchone()
    assert newest is not None
    row = newest["id"]
    sent = len(running.mailbox.mails)
    for delivery in (1, 2, 7, 2_000_000_000):
        for number in range(max(row - 1, 1), row + 6):
            running.redis.rpush("rq:queue:critical", f"{number}-{delivery}")
            running.redis.zadd(SCHEDULED, {f"{number}-{delivery}": time.time()})

    running.serves()

    eventually(lambda: not running.redis.llen("rq:queue:critical"), 5, "all jobs are taken")
    assert len(running.mailbox.mails) == sent + 3


def test_pickles_and_other_functions_jobs(running: Running, tmp_path: Path) -> None:
    """Jobs that stock RQ or rq-scheduler enqueued, and hashes with a bomb as data, are neither loaded nor run."""
    mark = tmp_path / "it ran"
    running.serves(1)
    for name in ("critical", "default"):
        Queue(name, connection=running.redis).enqueue(os.mkdir, str(mark))
        Queue(name, connection=running.redis).enqueue(os.mkdir, str(mark), job_id="1-1")
        Queue(name, connection=running.redis).enqueue(os.mkdir, str(mark), job_id="1000000-1")
        scheduler = Scheduler(name, connection=running.redis)
        scheduler.enqueue_at(datetime.now(UTC).replace(tzinfo=None), os.mkdir, str(mark))
        scheduler.schedule(datetime.now(UTC).replace(tzinfo=None), os.mkdir, args=[str(mark)], interval=1, repeat=5)
    newest = running.connection.execute("SELECT max(id) AS id FROM outbox").fetchone()
    assert newest is not None
    for number in range(1, 10):
        job_id = f"{newest['id'] + number}-1"
        data = zlib.compress(pickle.dumps(Bomb(mark)))
        running.redis.hset(f"rq:job:{job_id}", mapping={"data": data, "origin": "critical", "status": "queued"})
        running.redis.rpush("rq:queue:critical", job_id)
        running.redis.zadd(SCHEDULED, {f"{job_id}": 0})

    running.serves()

    eventually(lambda: not running.redis.llen("rq:queue:critical"), 5, "all jobs are taken")
    assert not mark.exists()


@pytest.mark.parametrize(
    "key",
    [
        "rq:queue:default",
        "rq:queue:critical",
        "rq:queue:critical:intermediate",
        SCHEDULED,
        "rq:queues",
        "rq:workers",
        "rq:workers:critical",
    ],
)
def test_a_key_of_the_wrong_type(running: Running, key: str) -> None:
    """A string at a key where RQ keeps a list or a set is deleted, without an operator's help."""
    running.redis.set(key, "not what you think")
    insert(running.connection, "no_such_task", {}, "default")
    insert(running.connection, "no_such_task", {}, "critical")

    running.serves()


def test_a_jobs_key_of_the_wrong_type(running: Running) -> None:
    """A string at the keys of the next rows' jobs does not prevent their hand-over."""
    running.serves(1)
    newest = running.connection.execute("SELECT max(id) AS id FROM outbox").fetchone()
    assert newest is not None
    for number in range(1, 10):
        running.redis.set(f"rq:job:{newest['id'] + number}-1", "not what you think")

    running.serves()


def test_values_of_ten_megabytes(running: Running) -> None:
    """Ids, hashes and strings of 10 MB are logged once each, in a short line, not at every look."""
    running.serves(1)
    large = b"x" * 10_000_000
    newest = running.connection.execute("SELECT max(id) AS id FROM outbox").fetchone()
    assert newest is not None
    service, relay, worker = running.processes
    before = count_foreign_lines(relay, worker)
    # Redis does not keep a command for a worker that is just reconnecting, as a key of the wrong type may make it do.
    channel = PUBSUB_CHANNEL_TEMPLATE % worker.events("started")[0]["worker"]
    eventually(lambda: running.redis.publish(channel, large), 5, "the worker listens")
    eventually(lambda: count_foreign_lines(relay, worker) != before, 10, "the command was received")
    for number in (1, 2):  # the keys of the next rows' jobs
        running.redis.hset(f"rq:job:{newest['id'] + number}-1", mapping={"data": large, "origin": large})
    running.redis.set(f"rq:job:{newest['id'] + 3}-1", large)
    running.redis.hset("rq:job:1000000-1", mapping={"data": large, "origin": large})
    running.redis.rpush("rq:queue:critical", large, large + b"2")
    running.redis.zadd(SCHEDULED, {large: 0, b"1000000-1": 0, large + b"for ever": math.inf})
    running.redis.set("rq:queue:default", large)

    running.serves()

    # Of the four such jobs, BLPOP may lose one to a connection that times out while Redis copies the others.
    least = Counter({"dropped job": 3, "deleted key": 1, "ignored an RQ command": 1})
    eventually(lambda: count_foreign_lines(relay, worker) - before >= least, 15, "all were logged")
    running.serves()
    assert count_foreign_lines(relay, worker) - before <= least + Counter({"dropped job": 1})
    assert all(len(line) < 2000 for process in (service, relay, worker) for line in process.text().splitlines())


def count_foreign_lines(*processes: Process) -> Counter[str]:
    """Returns the number of log lines about foreign data, by event."""
    kinds = ("dropped job", "deleted key", "ignored an RQ command")
    return Counter({kind: sum(len(process.events(kind)) for process in processes) for kind in kinds})


def insert(connection: Connection, task: str, payload: object, queue: str = "default") -> int:
    """Writes an outbox row without validation, and returns its id."""
    row = connection.execute(
        "INSERT INTO outbox (task, payload, queue) VALUES (%s, %s, %s) RETURNING id", [task, Jsonb(payload), queue]
    ).fetchone()
    assert row is not None
    return int(row["id"])


def test_rows_with_invalid_payloads(running: Running) -> None:
    """They become dead with an error that says why, however large they are; other rows are unharmed.

    Those that do not fit the model become dead only after their grace: another worker may handle them.
    """
    payloads: list[object] = [
        {},
        {"username": None},
        {"username": 5},
        {"username": ["real_0"]},
        {"username": "real_0", "sudo": True},
        {f"key_{n}": n for n in range(50_000)},
        {"username": "nobody_of_that_name"},
        {"username": "x" * 3_000_000},
        {"username": "'; DROP TABLE users; --"},
        {"username": "line\nbreak \u2028 \x1b[31m \U0001f600"},
    ]
    rows = [insert(running.connection, "send_verify_email", payload, "critical") for payload in payloads]

    unhandled = "SELECT FROM outbox WHERE id = ANY (%s) AND unhandled_since IS NOT NULL"
    eventually(lambda: len(running.connection.execute(unhandled, [rows]).fetchall()) == 6, 10, "all were claimed")
    running.connection.execute("UPDATE outbox SET unhandled_since = unhandled_since - interval '1 h'")

    running.serves()

    found = running.connection.execute(
        "SELECT status, last_error, attempts FROM outbox WHERE id = ANY (%s) ORDER BY id", [rows]
    ).fetchall()
    assert [row["status"] for row in found] == ["dead"] * len(payloads)
    assert [row["attempts"] for row in found] == [0] * 6 + [1] * 4
    assert all(10 < len(row["last_error"]) < 2000 for row in found)
    assert all("username" in row["last_error"] for row in found[:4])
    assert "sudo" in found[4]["last_error"]


def test_unknown_tasks(running: Running) -> None:
    """They wait for a newer worker, and no attempt counts; other rows are unharmed."""
    rows = [
        insert(running.connection, task, {}) for task in ("no_such_task", "os.system", "x" * 100, "\u2028 \x1b[31m")
    ]

    running.serves()

    def given_back() -> list[dict[str, Any]]:
        return running.connection.execute(
            "SELECT attempts FROM outbox WHERE id = ANY (%s) AND status <> 'running' AND unhandled_since IS NOT NULL "
            "AND last_error LIKE 'no handler for task%%'",
            [rows],
        ).fetchall()

    eventually(lambda: given_back() == [{"attempts": 0}] * len(rows), 10, "all were given back")


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param('{"username": %s}' % ("[" * 3000 + "]" * 3000), id="nested 3000 deep"),
        pytest.param('{"username": %s}' % ("9" * 5000), id="a number of 5000 digits"),
    ],
)
def test_a_payload_that_python_cannot_read(
    stack: Stack, connection: Connection, mailbox: Mailbox, payload: str, running: Running
) -> None:
    """JSON that is valid in Postgres and too much for Python's parser makes its row dead, and ends no process."""
    stack.environment |= {**QUICK, "OUTBOX_UNHANDLED_GRACE": "0"}
    url = stack.environment["REDIS_URL"]
    stack.environment["REDIS_URL"] = f"{url}?db=1" if url.startswith("unix:") else with_database(url, "1")
    processes = stack.run_all("relay", "worker")
    connection.execute(
        "INSERT INTO outbox (task, payload, queue) VALUES ('send_verify_email', %s::text::jsonb, 'critical')", [payload]
    )
    add_users(connection, ["real"])

    eventually(lambda: mailbox.to("real@example.com") or not all(map(Process.is_up, processes)), 10, "the mail")

    assert [process.text() for process in processes if not process.is_up()] == []
    eventually(lambda: connection.execute("SELECT FROM outbox WHERE status = 'dead'").fetchall(), 5, "the row is dead")
