"""`outbox up` as a real process, with its own servers and the signals of a terminal."""

import json
import re
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import httpx
import redis

from outbox.runtime.stop import SAME_SIGNAL_TIME
from tests.support.mailbox import free_port
from tests.support.up import ALICE, LIMIT, Up, assert_stopped_in_order, processes_in, running
from tests.support.waiting import eventually

SERVERS = ("redis", "postgres")
PROCESSES = ("service", "relay", "worker")


def test_an_interrupted_first_start_leaves_nothing_behind(up_folder: Path) -> None:
    """Ctrl-C while Postgres is being set up ends all processes, and the next `up` starts."""
    interrupted = Up(up_folder, free_port(), measured=False)
    interrupted.await_output("starting Postgres")
    interrupted.process.send_signal(signal.SIGINT)
    assert interrupted.await_exit() == 0, interrupted.output
    assert processes_in(up_folder) == []
    with running(up_folder, measured=False) as up:
        assert up.is_ready()


def test_what_up_prints_can_be_pasted_and_survives_a_kill(up_folder: Path) -> None:
    """The printed curl line creates a user, and the link in the mail still works in the next `up`.

    SIGKILL leaves the children running and the port in use; the next `up` ends them first. Ctrl-C stops everything in
    order.
    """
    port = free_port()
    up = Up(up_folder, port, measured=False)
    line = up.await_output(r"(?m)^curl .*$")[0]
    up.await_output("  ready  ")
    body = re.search(r"-d '(.*)'$", line)
    url = re.search(r"http://\S+", line)
    assert body
    assert url
    assert httpx.post(url[0], json=json.loads(body[1])).status_code == 201
    link = up.await_output(r"caught a mail .*link=(\S+)")[1]
    (mail,) = (up_folder / "data" / "mails").glob("*.eml")
    assert "alice@example.com" in mail.name
    assert link in mail.read_text(encoding="utf-8").replace("=\n", "").replace("=3D", "=")
    children = {up.await_start(name).pid for name in (*SERVERS, *PROCESSES)}
    assert {process.pid for process in processes_in(up_folder) if process.ppid() == up.process.pid} == children
    up.process.kill()
    up.await_exit()
    leftovers = {process.pid for process in processes_in(up_folder)}
    assert leftovers >= children

    with running(up_folder, port) as second:
        second.await_output("stopping what a killed 'outbox up' left running")
        assert not leftovers & {process.pid for process in processes_in(up_folder)}
        assert httpx.post(f"{second.url}/v1/users", json=json.loads(body[1])).status_code == 409
        path = link.partition("/v1/")[2]
        assert httpx.get(f"{second.url}/v1/{path}").status_code == 200
    assert_stopped_in_order(second, up_folder)


def test_a_process_that_dies_is_started_again(up_folder: Path) -> None:
    """`up` restarts each server and process that is killed, logs the new pid, and mails are still delivered.

    A second Ctrl-C ends a process at once that does not stop in time.
    """
    with running(up_folder, measured=False) as up:
        for name in PROCESSES:
            up.await_output(rf"  {name} +started")
        for name in PROCESSES:
            up.await_start(name).kill()
        for name in PROCESSES:
            up.await_output(f"{name} died: starting it again  cause=SIGKILL")
            up.await_output(rf"  {name} +started", times=2)
        for name in SERVERS:
            killed = up.await_start(name)
            killed.kill()
            up.await_output(f"{name} died: starting it again  cause=SIGKILL")
            assert up.await_start(name, times=2).pid != killed.pid
        names = (f"user_{n}" for n in count())  # an attempt without an answer may have created the user
        eventually(lambda: up.create_user(next(names)), LIMIT, "a user is created")
        up.await_output("caught a mail")

        up.await_start("relay", times=2).suspend()
        up.process.send_signal(signal.SIGINT)
        up.await_output("stopping")
        asked_at = time.monotonic()

        eventually(
            lambda: time.monotonic() - asked_at > SAME_SIGNAL_TIME, 2, "a second Ctrl-C counts as one of its own"
        )
        up.process.send_signal(signal.SIGINT)
        assert up.await_exit() == 0, up.output
        assert time.monotonic() - asked_at < 20, "the relay had its full time to stop"
    assert processes_in(up_folder) == []


def test_two_at_once_in_two_folders(up_folder: Path) -> None:
    """Two `up` with their own ports and folders do not affect each other; a third in a used folder is refused.

    With LOG_FORMAT=json every line is a JSON object, and `ready` has the addresses. SIGTERM stops `up` as Ctrl-C does.
    """
    for name in ("one", "two"):
        (up_folder / name).mkdir()
    with (
        running(up_folder / "one", measured=False) as one,
        running(up_folder / "two", measured=False, LOG_FORMAT="json") as two,
    ):
        third = Up(up_folder / "one", free_port())
        for up in (one, two):
            assert httpx.post(f"{up.url}/v1/users", json=ALICE).status_code == 201
            up.await_output("caught a mail")
        assert third.await_exit() == 1
        (sentence,) = third.lines
        assert "in use by another 'outbox up'" in sentence
        assert one.is_ready()
        one.process.send_signal(signal.SIGTERM)
        one.await_exit()
    assert_stopped_in_order(one, up_folder / "one")
    events = [json.loads(line) for line in two.lines]
    (ready,) = (event for event in events if event["event"] == "ready")
    assert ready["api"] == two.url
    assert ready["docs"] == f"{two.url}/schema"
    assert ready["curl"].startswith("curl ")


def test_one_server_alone(up_folder: Path) -> None:
    """`just redis` prints the URL of a Redis that answers until SIGINT."""
    command = [sys.executable, "-m", "outbox.devstack.single_server", "redis"]
    with subprocess.Popen(command, cwd=up_folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = re.fullmatch(r"export REDIS_URL='(.*)'\n", server.stdout.readline())
        assert url
        with redis.Redis.from_url(url[1]) as client:
            assert client.ping()
        server.send_signal(signal.SIGINT)
        assert server.wait(LIMIT) == 0
    assert processes_in(up_folder) == []
