"""`outbox up` as a developer runs it: a real process, a terminal's signals, and nothing but Python on the machine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import httpx
import psutil
import pytest
import redis

from outbox.devstack.unprivileged import is_root
from outbox.runtime.stop import AGAIN
from tests.support.mailbox import free_port
from tests.support.waiting import eventually

LIMIT = 60.0
"""Seconds until what a test waits for must have happened."""

ALICE = {"username": "alice", "password": "open-sesame-42", "full_name": "Alice Doe", "email": "alice@example.com"}

_OURS = re.compile(r"(OUTBOX|DATABASE|REDIS|SMTP|LOG|SECRET|PUBLIC|MAIL|VERIFY|HTTP_SERVER)_")


class Up:
    """A running `outbox up`, and what it has printed so far."""

    def __init__(self, folder: Path, port: int, *, measured: bool = True, **environment: str) -> None:
        left_out = _OURS if measured else re.compile(f"{_OURS.pattern}|COVERAGE_")
        inherited = {name: value for name, value in os.environ.items() if not left_out.match(name)}
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "outbox", "up", "--data", "data"],
            cwd=folder,
            env={**inherited, "HTTP_SERVER_ADDRESS": f"127.0.0.1:{port}", "VERIFY_EMAIL_DELAY": "0", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            self.lines.extend(line.rstrip("\n") for line in output)

    @property
    def output(self) -> str:
        """All that it has printed so far."""
        return "\n".join(self.lines)

    def sees(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Waits until `pattern` was printed so many times, and returns its last match."""
        eventually(
            lambda: len(re.findall(pattern, self.output)) >= times or self.process.poll() is not None, LIMIT, pattern
        )
        self._reader.join(0 if self.process.poll() is None else LIMIT)
        assert len(re.findall(pattern, self.output)) >= times, f"no {pattern!r} in\n{self.output}"
        return list(re.finditer(pattern, self.output))[-1]

    def ended(self) -> int:
        """Waits for the end, and returns the exit code."""
        code = self.process.wait(LIMIT)
        self._reader.join(LIMIT)
        return code


def living(folder: Path) -> list[psutil.Process]:
    """Returns the processes that belong to a folder: all children work in it, or name it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            named = any(str(folder) in part for part in process.cmdline())
            if process.pid != os.getpid() and (named or Path(process.cwd()).is_relative_to(folder)):
                found.append(process)
    return found


def of(folder: Path, module: str) -> psutil.Process:
    """Returns the process in which a module runs."""
    found = []
    for process in living(folder):
        with suppress(psutil.Error):  # one that was killed a moment ago
            if process.cmdline()[-2:] == ["outbox", module]:
                found.append(process)
    (only,) = found
    return only


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder to work in; whatever a failed test has left running in it is killed."""
    yield tmp_path
    for process in living(tmp_path):
        with suppress(psutil.Error):
            process.kill()


@contextmanager
def running(folder: Path, port: int | None = None, *, measured: bool = True, **environment: str) -> Iterator[Up]:
    """Runs `up` until the block is left; it is ready when the block begins."""
    up = Up(folder, port or free_port(), measured=measured, **environment)
    try:
        up.sees(r"  ready  |\"event\": ?\"ready\"")
        yield up
    finally:
        up.process.send_signal(signal.SIGINT)
        up.ended()


def test_what_up_prints_can_be_pasted_and_survives_a_kill(folder: Path) -> None:
    """The curl line creates a user, the mail is kept, and its link still works for the user in the next `up`.

    Ctrl-C while Postgres is being set up leaves no process behind, and the next `up` starts all the same. SIGKILL
    leaves all running, and the port taken; the next `up` ends them first. Ctrl-C ends all from the top down.
    """
    port = free_port()
    up = Up(folder, port, measured=False)
    up.sees("starting Postgres")
    up.process.send_signal(signal.SIGINT)
    assert up.ended() == 0, up.output
    assert living(folder) == []

    up = Up(folder, port, measured=False)
    line = up.sees(r"(?m)^curl .*$")[0]
    up.sees("  ready  ")
    body = re.search(r"-d '(.*)'$", line)
    url = re.search(r"http://\S+", line)
    assert body
    assert url
    assert httpx.post(url[0], json=json.loads(body[1])).status_code == 201
    link = up.sees(r"caught a mail .*link=(\S+)")[1]
    (mail,) = (folder / "data" / "mails").glob("*.eml")
    assert "alice@example.com" in mail.name
    assert link in mail.read_text(encoding="utf-8").replace("=\n", "").replace("=3D", "=")
    assert len([process for process in living(folder) if process.ppid() == up.process.pid]) == 5
    up.process.kill()
    up.ended()
    left = {process.pid for process in living(folder)}
    assert left

    with running(folder, port) as second:
        second.sees("stopping what a killed 'outbox up' left running")
        assert not left & {process.pid for process in living(folder)}
        assert httpx.post(f"{second.url}/v1/users", json=json.loads(body[1])).status_code == 409
        path = link.partition("/v1/")[2]
        assert httpx.get(f"{second.url}/v1/{path}").status_code == 200
    assert_stopped_in_order(second, folder)


def assert_stopped_in_order(up: Up, folder: Path) -> None:
    """Asserts that it has ended well and left nothing behind."""
    assert up.process.returncode == 0, up.output
    assert living(folder) == []
    assert re.findall(r"  up +(\w+) stopped", up.output) == ["service", "relay", "worker"]
    assert "Traceback" not in up.output


def test_a_process_that_dies_is_started_again(folder: Path) -> None:
    """Whatever is killed is back a moment later, `up` says so, and the whole still delivers mails.

    When one of them does not end in time, a second Ctrl-C hurries.
    """
    with running(folder, measured=False) as up:
        for name in ("service", "relay", "worker"):
            up.sees(rf"  {name} +started")
        for name in ("service", "relay", "worker"):
            of(folder, name).kill()
        for name in ("service", "relay", "worker"):
            up.sees(f"{name} died: starting it again  cause=SIGKILL")
            up.sees(rf"  {name} +started", times=2)
        server_of(up, "redis").kill()
        up.sees("redis died: starting it again")
        server_of(up, "postgres").kill()
        up.sees("postgres died: starting it again")
        names = (f"user_{n}" for n in count())  # a create that got no answer may have taken its name
        eventually(lambda: _created(up, next(names)), LIMIT, "a user is created")
        up.sees("caught a mail")

        of(folder, "relay").suspend()
        up.process.send_signal(signal.SIGINT)
        up.sees("stopping")
        asked = time.monotonic()

        eventually(lambda: time.monotonic() - asked > AGAIN, 2, "a second Ctrl-C is one of its own")
        up.process.send_signal(signal.SIGINT)
        assert up.ended() == 0, up.output
        assert time.monotonic() - asked < 20
    assert living(folder) == []


def server_of(up: Up, name: str) -> psutil.Process:
    """Returns the process of an embedded server; Redis may be Valkey."""
    names = ("redis", "valkey") if name == "redis" else (name,)
    found = []
    for process in psutil.Process(up.process.pid).children():
        with suppress(psutil.Error):  # one that was killed a moment ago
            if Path(process.cmdline()[0]).name.startswith(names):
                found.append(process)
    (server,) = found
    return server


def _status(up: Up) -> int:
    try:
        return httpx.get(f"{up.url}/readyz").status_code
    except httpx.TransportError:
        return 0


def _created(up: Up, name: str) -> bool:
    user = {**ALICE, "username": name, "email": f"{name}@example.com"}
    try:
        return httpx.post(f"{up.url}/v1/users", json=user).status_code == 201
    except httpx.TransportError:
        return False


def test_a_taken_port_is_refused_before_anything_starts(folder: Path) -> None:
    """A taken HTTP port is one sentence, and no server's folder is even made."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        up = Up(folder, port)
        assert up.ended() == 1
    (sentence,) = up.lines
    assert f"127.0.0.1:{port} is taken" in sentence
    assert not (folder / "data" / "postgres").exists()


@pytest.mark.skipif(not is_root(), reason="needs root to prepare a folder of another owner")
def test_a_data_folder_of_somebody_else_is_refused_before_anything_starts(folder: Path) -> None:
    """It is one sentence that names the folder and its owner, and nothing in the folder is touched."""
    data = folder / "data"
    data.mkdir(mode=0o755)
    (data / "lock").symlink_to(folder / "planted")
    os.chown(data, 54321, 54321)
    up = Up(folder, free_port())
    assert up.ended() == 1
    (sentence,) = up.lines
    assert f"the data folder {data} belongs to uid 54321: " in sentence
    assert [path.name for path in data.iterdir()] == ["lock"]
    assert not (folder / "planted").exists()


def test_wrong_variables_are_named_before_anything_starts(folder: Path) -> None:
    """Wrong variables, of whichever process, are a sentence each and exit code 2."""
    up = Up(folder, free_port(), REDIS_URL="http://redis", OUTBOX_BATCH="none", SECRET_KEY="short")
    assert up.ended() == 2
    assert sorted(line.split()[0] for line in up.lines) == ["OUTBOX_BATCH", "REDIS_URL", "SECRET_KEY"]
    assert not (folder / "data").exists()


def test_a_server_that_does_not_come_up_is_shown_with_the_end_of_its_log(folder: Path) -> None:
    """Where Postgres cannot use its folder, what it says about that is on the screen, and nothing stays running."""
    data = folder / "data" / "postgres" / "data"
    data.mkdir(parents=True)
    data.chmod(0o700)
    (data / "PG_VERSION").write_text("9\n", encoding="ascii")
    up = Up(folder, free_port())
    assert up.ended() == 1
    assert "postgres does not start" in up.output
    assert "Traceback" not in up.output
    assert living(folder) == []


def test_two_at_once_in_two_folders(folder: Path) -> None:
    """Two `up`s with their own ports and folders do not meet; a third in a folder in use is refused in a sentence.

    With LOG_FORMAT=json every line is a JSON object, and `ready` carries the addresses. SIGTERM ends it like Ctrl-C.
    """
    for name in ("one", "two"):
        (folder / name).mkdir()
    with (
        running(folder / "one", measured=False) as one,
        running(folder / "two", measured=False, LOG_FORMAT="json") as two,
    ):
        third = Up(folder / "one", free_port())
        for up in (one, two):
            assert httpx.post(f"{up.url}/v1/users", json=ALICE).status_code == 201
            up.sees("caught a mail")
        assert third.ended() == 1
        (sentence,) = third.lines
        assert "in use by another 'outbox up'" in sentence
        assert _status(one) == 200
        one.process.send_signal(signal.SIGTERM)
        one.ended()
    assert_stopped_in_order(one, folder / "one")
    events = [json.loads(line) for line in two.lines]
    (ready,) = (event for event in events if event["event"] == "ready")
    assert ready["api"] == two.url
    assert ready["docs"] == f"{two.url}/schema"
    assert ready["curl"].startswith("curl ")


def test_one_server_alone(folder: Path) -> None:
    """`just redis` prints the URL of a Redis that answers, for as long as it runs."""
    command = [sys.executable, "-m", "outbox.devstack.single_server", "redis"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as alone:
        assert alone.stdout is not None
        url = re.fullmatch(r"export REDIS_URL='(.*)'\n", alone.stdout.readline())
        assert url
        with redis.Redis.from_url(url[1]) as client:
            assert client.ping()
        alone.send_signal(signal.SIGINT)
        assert alone.wait(LIMIT) == 0
    assert living(folder) == []
