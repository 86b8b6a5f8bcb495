"""`outbox up` uses no file that another user may have put into its data folder."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from outbox.devstack.data_folder import locked_folder
from outbox.devstack.mail_catcher import catch_mails
from outbox.errors import StartError
from tests.support.data_folders import (
    FILES,
    FOLDERS,
    OTHER_UID,
    Use,
    mode_of,
    needs_root,
    sleeper,
    use_data,
    use_redis,
)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file outside the data folder, which the test must not change."""
    file = tmp_path / "victim"
    file.write_text("precious", encoding="ascii")
    file.chmod(0o644)
    before = file.lstat()
    yield file
    assert file.read_text(encoding="ascii") == "precious"
    assert (file.stat().st_mode, file.stat().st_uid) == (before.st_mode, before.st_uid)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An existing data folder."""
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    return folder


@needs_root
@pytest.mark.parametrize(("name", "use"), [*FILES, *FOLDERS])
def test_another_users_link_is_not_followed(data: Path, victim: Path, tmp_path: Path, name: str, use: Use) -> None:
    """A link that another user created is refused by name, whether its target is a file or a folder of this user."""
    precious = tmp_path / "precious"
    precious.mkdir(mode=0o700)
    planted = data / name
    planted.parent.mkdir(exist_ok=True)
    for target in (victim, precious):
        planted.symlink_to(target)
        os.chown(planted, OTHER_UID, OTHER_UID, follow_symlinks=False)
        with pytest.raises(StartError, match=f"{planted}.* symbolic link"):
            use(data)
        assert list(precious.iterdir()) == []
        assert mode_of(precious) == 0o700
        planted.unlink()


@pytest.mark.parametrize(("name", "use"), FILES)
def test_a_file_that_is_a_link_or_a_pipe_is_refused(data: Path, victim: Path, name: str, use: Use) -> None:
    """A symbolic or hard link is not followed, even one of this user, and a pipe is not waited for."""
    planted = data / name
    planted.parent.mkdir(exist_ok=True)
    for plant, why in (
        (planted.symlink_to, "symbolic link"),
        (planted.hardlink_to, "hard link"),
        (lambda _: os.mkfifo(planted), "not a regular file"),
    ):
        plant(victim)
        with pytest.raises(StartError, match=f"{planted}.*({why})"):
            use(data)
        planted.unlink()


@needs_root
@pytest.mark.parametrize(("name", "use"), FILES)
def test_a_file_of_another_user_is_refused(data: Path, name: str, use: Use) -> None:
    """The error names the owner, and the file is neither read nor written."""
    planted = data / name
    planted.parent.mkdir(exist_ok=True)
    planted.write_text("theirs", encoding="ascii")
    planted.chmod(0o755)
    os.chown(planted, OTHER_UID, OTHER_UID)
    with pytest.raises(StartError, match=rf"{planted} .*belongs to uid {OTHER_UID}; "):
        use(data)
    assert (planted.stat().st_uid, mode_of(planted)) == (OTHER_UID, 0o755)
    assert planted.read_text(encoding="ascii") == "theirs"


def test_an_unfinished_file_is_replaced(data: Path, victim: Path) -> None:
    """The key is written to a new file: a link in its place is removed, not followed."""
    (data / "secret_key.unfinished").symlink_to(victim)
    with locked_folder(data) as folder:
        assert len(folder.secret_key()) == 64
    assert not (data / "secret_key").is_symlink()


def test_a_list_that_everybody_may_write_to_ends_no_process(data: Path) -> None:
    """The list of processes is used only if no other user may have written to it, and wrong entries are skipped."""
    with sleeper() as process, locked_folder(data) as folder:
        folder.record_process("relay", process)
        planted = data / "processes.jsonl"
        planted.chmod(0o666)
        with pytest.raises(StartError, match=f"{planted}.*everybody may write to it"):
            folder.stop_leftovers(lambda _: None)
        assert process.poll() is None

        started = psutil.Process(process.pid).create_time()
        wrong = [{"name": "sshd", "pid": process.pid, "started": started}, [], {"name": "relay"}]
        wrong += [{"name": "relay", "pid": pid, "started": started} for pid in (-1, 2**80, "1", None)]
        planted.write_text("".join(f"{json.dumps(entry)}\n" for entry in wrong), encoding="utf-8")
        planted.chmod(0o600)
        folder.stop_leftovers(lambda _: None)
        assert process.poll() is None
        assert not planted.exists()


def test_a_data_folder_that_is_replaced_is_not_used(data: Path, tmp_path: Path) -> None:
    """Files are written to the folder that was opened, even if another folder has its path now."""
    with locked_folder(data) as folder, catch_mails(folder.mails), sleeper() as process:
        data.rename(tmp_path / "moved")
        data.mkdir()
        folder.secret_key()
        folder.record_process("relay", process)
        assert list(data.iterdir()) == []
    assert (tmp_path / "moved" / "secret_key").exists()


def test_an_earlier_versions_folder_is_closed_to_others(tmp_path: Path) -> None:
    """Under any umask, only the owner may use the files and list the folders; older modes are corrected."""
    before = os.umask(0)
    try:
        data = tmp_path / "new" / "data"
        for _ in range(2):
            use_data(data)
            use_redis(data)
            files = {path.name: path for path in data.rglob("*") if path.is_file()}
            assert {"lock", "secret_key", "processes.jsonl", "redis.log"} == set(files)
            assert {mode_of(path) for path in files.values()} == {0o600}
            assert {mode_of(folder) & 0o066 for folder in (data / "mails", data / "redis")} == {0}
            assert mode_of(data.parent) & 0o022 == 0
            for path in files.values():
                path.chmod(0o664)
            for folder in (data / "mails", data / "redis"):
                folder.chmod(0o755)
    finally:
        os.umask(before)
