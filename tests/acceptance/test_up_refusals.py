"""`outbox up` refuses to start when something is wrong, in a sentence."""

import os
import socket
from pathlib import Path

import pytest

from outbox.devstack.unprivileged import is_root
from tests.support.mailbox import free_port
from tests.support.up import Up, processes_in


def test_a_port_in_use_is_refused_before_anything_starts(up_folder: Path) -> None:
    """The sentence names the address, and no folder of a server is created."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        up = Up(up_folder, port)
        assert up.await_exit() == 1
    (sentence,) = up.lines
    assert f"127.0.0.1:{port} is taken" in sentence
    assert not (up_folder / "data" / "postgres").exists()


@pytest.mark.skipif(not is_root(), reason="needs root to prepare a folder of another owner")
def test_a_data_folder_of_another_user_is_refused_before_anything_starts(up_folder: Path) -> None:
    """The sentence names the folder and its owner, and the folder is not changed."""
    data = up_folder / "data"
    data.mkdir(mode=0o755)
    (data / "lock").symlink_to(up_folder / "planted")
    os.chown(data, 54321, 54321)
    up = Up(up_folder, free_port())
    assert up.await_exit() == 1
    (sentence,) = up.lines
    assert f"the data folder {data} belongs to uid 54321: " in sentence
    assert [path.name for path in data.iterdir()] == ["lock"]
    assert not (up_folder / "planted").exists()


def test_wrong_variables_are_named_before_anything_starts(up_folder: Path) -> None:
    """Each wrong variable of any process is a sentence, and the exit code is 2."""
    up = Up(up_folder, free_port(), REDIS_URL="http://redis", OUTBOX_BATCH="none", SECRET_KEY="short")
    assert up.await_exit() == 2
    assert sorted(line.split()[0] for line in up.lines) == ["OUTBOX_BATCH", "REDIS_URL", "SECRET_KEY"]
    assert not (up_folder / "data").exists()


def test_a_server_that_does_not_start_is_reported_with_the_end_of_its_log(up_folder: Path) -> None:
    """If Postgres cannot use its folder, `up` prints what Postgres says about it and leaves no process running."""
    data = up_folder / "data" / "postgres" / "data"
    data.mkdir(parents=True)
    data.chmod(0o700)
    (data / "PG_VERSION").write_text("9\n", encoding="ascii")
    up = Up(up_folder, free_port())
    assert up.await_exit() == 1
    assert "postgres does not start" in up.output
    assert "Traceback" not in up.output
    assert processes_in(up_folder) == []
