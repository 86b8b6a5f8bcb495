"""`outbox up` ends and restarts its children, and finds those of an `up` that was killed."""

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
from outbox.devstack.data_folder import locked_folder
from outbox.devstack.environment import _PLACEHOLDERS, find_free_address, local_url
from outbox.devstack.log_stream import Stream
from outbox.devstack.processes import Program, Restarter
from outbox.errors import SettingsError, StartError
from outbox.runtime.endpoints import Address
from outbox.runtime.process import EXIT_SETTINGS, PROCESSES
from tests.support.waiting import eventually

OUR_PATH = os.pathsep.join(str(Path(folder).resolve()) for folder in sys.path if folder)
"""Absolute paths to our modules, for a child in any folder."""
UNSTOPPABLE = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); signal.pause()"
"""A program that ignores SIGTERM."""


def _unstoppable(supervisor: Supervisor) -> subprocess.Popen[bytes]:
    process = spawn(supervisor, "unstoppable", [sys.executable, "-c", UNSTOPPABLE], subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == b"ready\n"
    return process


@pytest.mark.parametrize(("limit", "hurried"), [(0.1, False), (60, True)])
def test_a_child_that_ignores_sigterm_is_killed(limit: float, hurried: bool) -> None:  # noqa: FBT001 - pytest passes it
    """It is killed after the limit, or at once if the supervisor is hurried."""
    supervisor = Supervisor(is_hurried=lambda: hurried)
    process = _unstoppable(supervisor)
    end(supervisor, process, signal.SIGTERM, limit)
    assert process.returncode == -signal.SIGKILL


def test_ending_twice_is_safe() -> None:
    """Ending a child that has ended does nothing."""
    process = _unstoppable(Supervisor())
    end(Supervisor(), process, signal.SIGKILL, 10)
    end(Supervisor(), process, signal.SIGKILL, 10)


def test_wrong_settings_end_up_with_the_message_of_the_process() -> None:
    """A process that exits with code 2 is not restarted; its message becomes the error."""
    program = _run_to_exit("relay", {"PYTHONPATH": OUR_PATH})
    with pytest.raises(SettingsError, match="DATABASE_URL is not set: set it to"):
        Restarter([program]).check()


@pytest.mark.parametrize("name", PROCESSES)
def test_a_module_in_the_current_folder_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An `outbox.py` in the current folder is not run; our process runs, and reports missing settings."""
    (tmp_path / "outbox.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert _run_to_exit(name, {"PYTHONPATH": OUR_PATH}).process.returncode == EXIT_SETTINGS


def test_a_worker_finds_handlers_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that OUTBOX_HANDLERS names is imported from the folder in which `up` runs."""
    (tmp_path / "greetings.py").write_text("import os; os._exit(3)")
    monkeypatch.chdir(tmp_path)
    program = _run_to_exit("worker", {**_PLACEHOLDERS, "PYTHONPATH": OUR_PATH, "OUTBOX_HANDLERS": "greetings"})
    assert program.process.returncode == 3


def _run_to_exit(name: str, environment: dict[str, str]) -> Program:
    program = Program(name, environment, Stream(io.StringIO(), as_json=False, on_broken=lambda: None), Supervisor())
    program.process.wait(60)
    program.drain()
    return program


def test_a_leftover_is_ended(tmp_path: Path) -> None:
    """The next `up` ends a recorded process, and does not touch another process that got a recorded pid."""
    with locked_folder(tmp_path) as folder:
        leftover, other = _unstoppable(Supervisor()), _unstoppable(Supervisor())
        folder.record_process("relay", leftover)
        recorded = (tmp_path / "processes.jsonl").read_text()
        started = str(psutil.Process(leftover.pid).create_time())
        (tmp_path / "processes.jsonl").write_text(
            recorded + recorded.replace(str(leftover.pid), str(other.pid)).replace(started, "12345.0") + '{"na'
        )
        folder.stop_leftovers(lambda _: leftover.kill())  # the wait after SIGTERM, cut short
        eventually(lambda: leftover.poll() is not None, 10, "the leftover ends")
        assert other.poll() is None
        end(Supervisor(), other, signal.SIGKILL, 10)


def test_a_folder_is_locked_once(tmp_path: Path) -> None:
    """A second `up` is refused while the first uses the folder, and not after."""
    with locked_folder(tmp_path), pytest.raises(StartError, match="in use"), locked_folder(tmp_path):
        pass
    with locked_folder(tmp_path):
        pass


def test_the_secret_key_is_created_once(tmp_path: Path) -> None:
    """Later calls return the same key, and only its owner may read the file."""
    with locked_folder(tmp_path) as folder:
        key = folder.secret_key()
        assert len(key) >= 32
        assert folder.secret_key() == key
    assert (tmp_path / "secret_key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"cut", b"\xff" * 64])
def test_an_unusable_secret_key_is_reported(tmp_path: Path, content: bytes) -> None:
    """A file left empty by a power loss is named; otherwise the service would report SECRET_KEY as missing."""
    with locked_folder(tmp_path) as folder:
        (tmp_path / "secret_key").write_bytes(content)
        with pytest.raises(StartError, match=f"{tmp_path / 'secret_key'} holds no key"):
            folder.secret_key()


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[" * 100_000, b'{"name": "relay", "pid": 99999999999999999999, "started": 1.0}']
)
def test_a_damaged_line_in_the_list_of_processes_is_skipped(tmp_path: Path, line: bytes) -> None:
    """The other lines are read."""
    with locked_folder(tmp_path) as folder:
        leftover = _unstoppable(Supervisor())
        folder.record_process("relay", leftover)
        file = tmp_path / "processes.jsonl"
        file.write_bytes(line + b"\n" + file.read_bytes())
        folder.stop_leftovers(lambda _: leftover.kill())
        eventually(lambda: leftover.poll() is not None, 10, "the leftover ends")


def test_a_free_port_is_found_and_a_taken_one_refused() -> None:
    """Port 0 becomes a real port; the error for a port in use names it."""
    assert find_free_address(Address("127.0.0.1", 0)).port > 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(StartError, match=f"127.0.0.1:{port} is taken"):
            find_free_address(Address("127.0.0.1", port))


@pytest.mark.parametrize(
    ("host", "url"), [("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80"), ("host", "http://host:80")]
)
def test_the_printed_url_can_be_opened_on_this_machine(host: str, url: str) -> None:
    """A wildcard address becomes a loopback address."""
    assert local_url(Address(host, 80)) == url
