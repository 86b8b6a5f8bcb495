"""Redis and the outbox hold what is not ours: nothing of it runs, nothing stops, real users still get their mails."""

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
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        """Says how it is to be loaded."""
        return os.mkdir, (str(self.folder),)


@dataclass
class Running:
    """The three processes, and users that are real."""

    stack: Stack
    processes: list[Process]
    connection: Connection
    redis: redis.Redis
    mailbox: Mailbox
    numbers: Iterator[int] = field(default_factory=count)

    def serves(self, users: int = 3) -> None:
        """Creates users and waits until each has got exactly one mail; nothing may have ended or crashed."""
        names = [f"real_{next(self.numbers)}" for _ in range(users)]
        assert [self.stack.create_user(name)[0] for name in names] == [201] * users
        eventually(lambda: all(self.mailbox.to(f"{name}@example.com") for name in names), 15, "the mails")
        eventually(lambda: not self.unfinished(), 10, "all rows are done or dead")
        assert [len(self.mailbox.to(f"{name}@example.com")) for name in names] == [1] * users
        for process in self.processes:
            assert process.is_up(), process.text()
            assert "Traceback" not in process.text()

    def unfinished(self) -> list[dict[str, Any]]:
        """Returns rows that somebody still has to do something about."""
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
    """The three processes, for all tests here: they have to survive every one of them."""
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
    """Leaves nothing of the test before in Redis, and no row that waits."""
    running.redis.flushall()


def test_garbage_in_the_queues_and_in_the_set(running: Running) -> None:
    """Ids that no relay has written are dropped, wherever they are and whatever their score."""
    running.serves(1)
    for queue in ("critical", "default"):
        running.redis.rpush(f"rq:queue:{queue}", *GARBAGE_IDS)
    for number, member in enumerate(GARBAGE_IDS):
        running.redis.zadd(SCHEDULED, {member: [-math.inf, 0, time.time(), time.time() + 0.5][number % 4]})
    running.redis.zadd(SCHEDULED, {"for ever": math.inf})

    running.serves()

    eventually(lambda: running.redis.zcard(SCHEDULED) <= 1, 5, "the set is rid of what is due")
    assert running.redis.llen("rq:queue:critical") == running.redis.llen("rq:queue:default") == 0


def test_ids_of_done_rows_and_old_deliveries(running: Running) -> None:
    """Jobs of rows that are done, of deliveries that were, and of ones that are yet to be, send nothing."""
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

    eventually(lambda: not running.redis.llen("rq:queue:critical"), 5, "all are taken")
    assert len(running.mailbox.mails) == sent + 3


def test_pickles_and_other_functions_jobs(running: Running, tmp_path: Path) -> None:
    """Jobs that stock RQ or rq-scheduler enqueued, and hashes whose data is a bomb, are neither loaded nor run."""
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

    eventually(lambda: not running.redis.llen("rq:queue:critical"), 5, "all are taken")
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
    """A string where RQ keeps a list or a set is got rid of: nobody has to repair anything."""
    running.redis.set(key, "not what you think")
    insert(running.connection, "no_such_task", {}, "default")
    insert(running.connection, "no_such_task", {}, "critical")

    running.serves()


def test_a_jobs_key_of_the_wrong_type(running: Running) -> None:
    """A string where the next rows' jobs will be does not keep the rows from being handed over."""
    running.serves(1)
    newest = running.connection.execute("SELECT max(id) AS id FROM outbox").fetchone()
    assert newest is not None
    for number in range(1, 10):
        running.redis.set(f"rq:job:{newest['id'] + number}-1", "not what you think")

    running.serves()


def test_values_of_ten_megabytes(running: Running) -> None:
    """Ids, hashes and strings of 10 MB cost a line each, which holds little of them, and not a line per look."""
    running.serves(1)
    large = b"x" * 10_000_000
    newest = running.connection.execute("SELECT max(id) AS id FROM outbox").fetchone()
    assert newest is not None
    service, relay, worker = running.processes
    before = told(relay, worker)
    # Redis keeps no command for a worker that connects anew just then, as a key of the wrong type may make it.
    channel = PUBSUB_CHANNEL_TEMPLATE % worker.events("started")[0]["worker"]
    eventually(lambda: running.redis.publish(channel, large), 5, "the worker listens")
    eventually(lambda: told(relay, worker) != before, 10, "the command was heard")
    for number in (1, 2):  # where the next rows' jobs will be
        running.redis.hset(f"rq:job:{newest['id'] + number}-1", mapping={"data": large, "origin": large})
    running.redis.set(f"rq:job:{newest['id'] + 3}-1", large)
    running.redis.hset("rq:job:1000000-1", mapping={"data": large, "origin": large})
    running.redis.rpush("rq:queue:critical", large, large + b"2")
    running.redis.zadd(SCHEDULED, {large: 0, b"1000000-1": 0, large + b"for ever": math.inf})
    running.redis.set("rq:queue:default", large)

    running.serves()

    lines = Counter({"dropped job": 4, "deleted key": 1, "ignored an RQ command": 1})
    eventually(lambda: told(relay, worker) - before >= lines, 15, "all were seen")
    running.serves()
    assert told(relay, worker) - before == lines
    assert all(len(line) < 2000 for process in (service, relay, worker) for line in process.text().splitlines())


def told(*processes: Process) -> Counter[str]:
    """Returns how many lines of each kind there are of what strangers did."""
    kinds = ("dropped job", "deleted key", "ignored an RQ command")
    return Counter({kind: sum(len(process.events(kind)) for process in processes) for kind in kinds})


def insert(connection: Connection, task: str, payload: object, queue: str = "default") -> int:
    """Writes an outbox row without asking anybody and returns its id."""
    row = connection.execute(
        "INSERT INTO outbox (task, payload, queue) VALUES (%s, %s, %s) RETURNING id", [task, Jsonb(payload), queue]
    ).fetchone()
    assert row is not None
    return int(row["id"])


def test_rows_whose_payloads_do_not_fit(running: Running) -> None:
    """They are dead with an error that says why, however large they are; others are unharmed.

    Those that do not fit the model are so only when their grace is over: another worker may handle them.
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
    eventually(lambda: len(running.connection.execute(unhandled, [rows]).fetchall()) == 6, 10, "all were looked at")
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


def test_tasks_that_nobody_knows(running: Running) -> None:
    """They wait for a newer worker, without an attempt counted; others are unharmed."""
    rows = [
        insert(running.connection, task, {}) for task in ("no_such_task", "os.system", "x" * 100, "\u2028 \x1b[31m")
    ]

    running.serves()

    def judged() -> list[dict[str, Any]]:
        return running.connection.execute(
            "SELECT attempts FROM outbox WHERE id = ANY (%s) AND status <> 'running' AND unhandled_since IS NOT NULL "
            "AND last_error LIKE 'no handler for task%%'",
            [rows],
        ).fetchall()

    eventually(lambda: judged() == [{"attempts": 0}] * len(rows), 10, "all were given back")


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
    """JSON that is good to Postgres and too much for Python's parser makes its row dead, and ends no process."""
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
