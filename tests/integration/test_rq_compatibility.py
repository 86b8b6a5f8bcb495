"""A worker as an RQ worker: stock RQ's tools list it and command it."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from rq import Worker
from rq.command import send_shutdown_command, send_stop_job_command
from rq.suspension import resume, suspend
from structlog.testing import capture_logs

from outbox.runtime import redis_connection
from outbox.runtime.stop import Stop
from outbox_worker.registration import Registration
from tests.conftest import Connection
from tests.support.manual_clock import ManualClock
from tests.support.processes import Process, Stack
from tests.support.rows import add_row, read_row
from tests.support.waiting import eventually


@pytest.fixture
def running(stack: Stack, redis_client: redis.Redis) -> Process:
    """A worker that has registered."""
    process = stack.run("worker")
    eventually(lambda: Worker.all(connection=redis_client), 5, "its registration")
    return process


@pytest.fixture
def stop() -> Stop:
    """The stop that RQ's shutdown command requests."""
    return Stop()


@pytest.fixture
def registration(redis_url: str, stop: Stop) -> Iterator[Registration]:
    """The registration of a worker that does not run: the test makes it beat."""
    registration = Registration(redis_connection.connect(redis_url, "test"), ["critical", "default"], stop)
    yield registration
    registration.close()
    if registration._commands is not None:
        registration._commands.join(5)


def test_rq_lists_suspends_resumes_and_stops_it(
    running: Process, connection: Connection, redis_client: redis.Redis, redis_url: str
) -> None:
    """`rq info` shows it with its queues and state; suspend pauses it, resume resumes it, shutdown ends it with 0."""
    (seen,) = Worker.all(connection=redis_client)
    assert sorted(seen.queue_names()) == ["critical", "default"]
    assert seen.get_state() == "idle"
    assert seen.pid == running.popen.pid
    command = [str(Path(sys.executable).with_name("rq")), "info", "--url", redis_url, "--raw"]
    info = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    (line,) = [line for line in info.splitlines() if line.startswith(f"worker {seen.name} ")]
    assert " idle critical, default." in line

    suspend(redis_client)
    eventually(lambda: redis_client.get("rq:suspended") and running.is_up())
    delivery = add_row(connection, task="send_verify_email", payload='{"username": "nobody"}')
    eventually(lambda: _is_paused(redis_client), 5, "it waits on no queue")
    redis_client.rpush("rq:queue:default", delivery.job_id)
    resumed_at = connection.execute("SELECT now() AS now").fetchone()
    resume(redis_client)
    eventually(lambda: read_row(connection, delivery)["status"] == "dead", 5, "the row, whose user is gone")
    assert resumed_at is not None
    assert read_row(connection, delivery)["started_at"] > resumed_at["now"], "nothing was taken while it was suspended"

    send_shutdown_command(redis_client, seen.name)
    assert running.wait(10) == 0
    assert Worker.all(connection=redis_client) == []
    assert running.events("stopped")


def _is_paused(client: redis.Redis) -> bool:
    return all(entry["cmd"] != "blpop" for entry in client.client_list())


def test_garbage_on_its_channel_is_ignored(running: Process, redis_client: redis.Redis) -> None:
    """After any published message, the next command works."""
    (seen,) = Worker.all(connection=redis_client)
    channel = f"rq:pubsub:{seen.name}"
    eventually(lambda: dict(redis_client.pubsub_numsub(channel)).get(channel.encode()) == 1)
    garbage = [b"", b"\xff\0", b"{", b"[]", b"7", b'{"command": ["shutdown"]}', b"[" * 100_000, b"x" * 5_000_000]
    garbage += [b'{"command": "shutdown", "numbers": [%s]}' % b",".join([b"1"] * 2_000_000)]
    garbage += [b'{"command": "stop-job", "job_id": "\\"command\\": \\"shutdown\\""}', b'{"command": "kill-horse"}']
    for message in garbage:
        redis_client.publish(channel, message)
    eventually(lambda: len(running.events("ignored an RQ command")) == len(garbage))
    assert running.is_up()
    redis_client.publish(channel, b'{"command":"shutdown"}')
    assert running.wait(10) == 0
    assert "Traceback" not in running.text()


def test_its_registration_comes_back(registration: Registration, redis_client: redis.Redis) -> None:
    """The next heartbeat after a FLUSHALL writes the whole entry again: queues, birth and expiry."""
    registration.beat(busy=False)
    born = Worker.all(connection=redis_client)[0].birth_date
    redis_client.flushdb()
    registration.beat(busy=False)
    assert Worker.all(connection=redis_client) == [], "not before it is due"
    registration.forget()
    registration.beat(busy=False)
    (seen,) = Worker.all(connection=redis_client)
    assert (seen.name, sorted(seen.queue_names())) == (registration.name, ["critical", "default"])
    assert seen.birth_date == born
    assert 0 < redis_client.ttl(registration.key) <= 420


def test_a_foreign_key_does_not_stop_a_heartbeat(registration: Registration, redis_client: redis.Redis) -> None:
    """The worker overwrites its own key; lists of a wrong type are left to the relay and logged."""
    cases: list[tuple[str, list[str]]] = [
        (registration.key, []),
        ("rq:workers", ["registered in part"]),
        ("rq:workers:critical", ["registered in part"]),
    ]
    for key, events in cases:
        redis_client.delete("rq:workers")
        redis_client.set(key, "x")
        registration.forget()
        with capture_logs() as lines:
            registration.beat(busy=False)
        assert redis_client.hget(registration.key, "hostname") == socket.gethostname().encode()
        assert [line["event"] for line in lines] == events


def test_rq_tools_that_need_a_running_job_fail(redis_client: redis.Redis) -> None:
    """RQ's stop-job command reads the hash of a running job, which does not exist here."""
    from rq.exceptions import NoSuchJobError

    with pytest.raises(NoSuchJobError):
        send_stop_job_command(redis_client, "1-1")


def test_shutdown_commands_let_handlers_end(
    registration: Registration, stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of commands is an ordinary stop; a signal that follows counts as the first."""
    clock = ManualClock()
    monkeypatch.setattr(time, "monotonic", clock)
    for _ in range(3):
        registration.obey({"data": b'{"command": "shutdown"}'})
        clock.advance(5)
    assert stop.is_requested()
    assert not stop.is_hurried()
    stop.record_signal()
    assert not stop.is_hurried()
    clock.advance(5)
    stop.record_signal()
    assert stop.is_hurried()
