"""Children of `outbox up`: how they are ended, restarted and found again."""

import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from outbox.devstack.child_process import Supervisor, end, spawn
from outbox.devstack.data_folder import held
from outbox.devstack.environment import _STAND_INS, free_address, local_url
from outbox.devstack.log_stream import Stream
from outbox.devstack.processes import NAMES, Program, Watch
from outbox.errors import SettingsError, StartError
from outbox.runtime.endpoints import Address
from outbox.runtime.process import EXIT_SETTINGS
from tests.support.waiting import eventually

OUR_PATH = os.pathsep.join(str(Path(folder).resolve()) for folder in sys.path if folder)
"""Where our modules are, whichever folder is the current one."""
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"


def _deaf(supervisor: Supervisor) -> subprocess.Popen[bytes]:
    process = spawn(supervisor, "deaf", [sys.executable, "-c", DEAF], subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == b"deaf\n"
    return process


@pytest.mark.parametrize(("limit", "hurried"), [(0.1, False), (60, True)])
def test_a_child_that_does_not_listen_is_killed(limit: float, hurried: bool) -> None:  # noqa: FBT001 - pytest passes it
    """A child that ignores SIGTERM is killed after the limit, or at once when somebody is in a hurry."""
    supervisor = Supervisor(hurried=lambda: hurried)
    process = _deaf(supervisor)
    end(supervisor, process, signal.SIGTERM, limit)
    assert process.returncode == -signal.SIGKILL


def test_ending_twice_is_safe() -> None:
    """A child that has ended is left alone."""
    process = _deaf(Supervisor())
    end(Supervisor(), process, signal.SIGKILL, 10)
    end(Supervisor(), process, signal.SIGKILL, 10)


def test_wrong_settings_end_it_all_with_the_process_own_sentence() -> None:
    """A process that exits with code 2 is not restarted: its sentence becomes the error."""
    program = _ended("relay", {"PYTHONPATH": OUR_PATH})
    with pytest.raises(SettingsError, match="DATABASE_URL is not set: set it to"):
        Watch([program]).look()


@pytest.mark.parametrize("name", NAMES)
def test_a_module_in_the_current_folder_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An `outbox.py` where `up` is started is not run; ours is, and says that it lacks settings."""
    (tmp_path / "outbox.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert _ended(name, {"PYTHONPATH": OUR_PATH}).process.returncode == EXIT_SETTINGS


def test_a_worker_finds_handlers_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that OUTBOX_HANDLERS names is imported from where `up` is started."""
    (tmp_path / "greetings.py").write_text("import os; os._exit(3)")
    monkeypatch.chdir(tmp_path)
    program = _ended("worker", {**_STAND_INS, "PYTHONPATH": OUR_PATH, "OUTBOX_HANDLERS": "greetings"})
    assert program.process.returncode == 3


def _ended(name: str, environment: dict[str, str]) -> Program:
    program = Program(name, environment, Stream(io.StringIO(), as_json=False, broken=lambda: None), Supervisor())
    program.process.wait(60)
    program.drain()
    return program


def test_a_leftover_is_found_again_and_ended(tmp_path: Path) -> None:
    """What the folder remembers is ended by the next; a number that another process has by now is left alone."""
    with held(tmp_path) as folder:
        leftover, stranger = _deaf(Supervisor()), _deaf(Supervisor())
        folder.remember("relay", leftover)
        remembered = (tmp_path / "processes.jsonl").read_text()
        started = str(psutil.Process(leftover.pid).create_time())
        (tmp_path / "processes.jsonl").write_text(
            remembered + remembered.replace(str(leftover.pid), str(stranger.pid)).replace(started, "12345.0") + '{"na'
        )
        folder.stop_leftovers(lambda _: leftover.kill())  # the wait after SIGTERM, cut short
        eventually(lambda: leftover.poll() is not None, 10, "the leftover ends")
        assert stranger.poll() is None
        end(Supervisor(), stranger, signal.SIGKILL, 10)


def test_a_folder_is_held_once(tmp_path: Path) -> None:
    """The second to ask for a folder is told that it is in use; after the first has left it is free."""
    with held(tmp_path), pytest.raises(StartError, match="in use"), held(tmp_path):
        pass
    with held(tmp_path):
        pass


def test_the_secret_key_is_made_once_and_private(tmp_path: Path) -> None:
    """The same key comes back, and nobody but its owner may read it."""
    with held(tmp_path) as folder:
        key = folder.secret_key()
        assert len(key) >= 32
        assert folder.secret_key() == key
    assert (tmp_path / "secret_key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"cut", b"\xff" * 64])
def test_what_is_no_secret_key_is_named(tmp_path: Path, content: bytes) -> None:
    """A machine that loses power may leave the file empty; SECRET_KEY would be said to be missing."""
    with held(tmp_path) as folder:
        (tmp_path / "secret_key").write_bytes(content)
        with pytest.raises(StartError, match=f"{tmp_path / 'secret_key'} holds no key"):
            folder.secret_key()


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[" * 100_000, b'{"name": "relay", "pid": 99999999999999999999, "started": 1.0}']
)
def test_a_list_of_processes_that_was_spoilt_is_left_out(tmp_path: Path, line: bytes) -> None:
    """Whatever a line has turned into, the others are read."""
    with held(tmp_path) as folder:
        leftover = _deaf(Supervisor())
        folder.remember("relay", leftover)
        file = tmp_path / "processes.jsonl"
        file.write_bytes(line + b"\n" + file.read_bytes())
        folder.stop_leftovers(lambda _: leftover.kill())
        eventually(lambda: leftover.poll() is not None, 10, "the leftover ends")


def test_a_free_port_is_found_and_a_taken_one_refused() -> None:
    """Port 0 becomes a real port; a port that somebody listens on is an error that names it."""
    assert free_address(Address("127.0.0.1", 0)).port > 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(StartError, match=f"127.0.0.1:{port} is taken"):
            free_address(Address("127.0.0.1", port))


@pytest.mark.parametrize(
    ("host", "url"), [("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80"), ("host", "http://host:80")]
)
def test_the_printed_url_can_be_opened_on_this_machine(host: str, url: str) -> None:
    """A wildcard address is nothing that a browser can open."""
    assert local_url(Address(host, 80)) == url
