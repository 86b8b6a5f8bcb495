"""The data folder of `outbox up`, where somebody else has prepared it or may write beside it."""

import json
import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import pytest

from outbox.devstack.child_process import Supervisor, end, spawn
from outbox.devstack.data_folder import locked_folder
from outbox.devstack.embedded import embedded_postgres, embedded_redis
from outbox.devstack.mail_catcher import catch_mails
from outbox.devstack.unprivileged import is_root
from outbox.errors import StartError

SOMEBODY = 54321
"""A uid that is neither root's nor ours."""

needs_root = pytest.mark.skipif(not is_root(), reason="needs root to prepare a folder of another owner")


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file outside the data folder, which is as it was when the test ends."""
    file = tmp_path / "victim"
    file.write_text("precious", encoding="ascii")
    file.chmod(0o644)
    before = file.lstat()
    yield file
    assert file.read_text(encoding="ascii") == "precious"
    assert (file.stat().st_mode, file.stat().st_uid) == (before.st_mode, before.st_uid)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder that is there already."""
    made = tmp_path / "data"
    made.mkdir(mode=0o700)
    return made


def _use(data: Path) -> None:
    """Does what `outbox up` does with the files that it keeps in its data folder itself."""
    with locked_folder(data) as folder:
        folder.stop_leftovers(lambda _: None)
        with _sleeper() as sleeper:
            folder.record_process("relay", sleeper)
        folder.secret_key()
        with catch_mails(folder.mails):
            pass


@contextmanager
def _sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = spawn(Supervisor(), "sleeper", ["sleep", "60"], subprocess.DEVNULL)
    try:
        yield process
    finally:
        end(Supervisor(), process, signal.SIGKILL, 10)


def _redis(data: Path) -> None:
    with embedded_redis(data / "redis"):
        pass


def _postgres(data: Path) -> None:
    with embedded_postgres(data / "postgres"):
        pass


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


PLANTED: list[tuple[str, Callable[[Path], None]]] = [
    ("lock", _use),
    ("processes.jsonl", _use),
    ("secret_key", _use),
    ("mails", _use),
    ("redis", _redis),
    ("redis/redis.log", _redis),
    ("postgres", _postgres),
    ("postgres/postgres.log", _postgres),
    ("postgres/data", _postgres),
]
FILES = [(name, use) for name, use in PLANTED if "." in name or (use is _use and name != "mails")]
FOLDERS = [(name, use) for name, use in PLANTED if (name, use) not in FILES]


@needs_root
@pytest.mark.parametrize(("name", "use"), PLANTED)
def test_another_users_link_is_not_followed(
    data: Path, victim: Path, tmp_path: Path, name: str, use: Callable[[Path], None]
) -> None:
    """A link that somebody else has planted is refused by name, whether it leads to a file or to a folder of ours."""
    precious = tmp_path / "precious"
    precious.mkdir(mode=0o700)
    planted = data / name
    planted.parent.mkdir(exist_ok=True)
    for target in (victim, precious):
        planted.symlink_to(target)
        os.chown(planted, SOMEBODY, SOMEBODY, follow_symlinks=False)
        with pytest.raises(StartError, match=f"{planted}.* symbolic link"):
            use(data)
        assert list(precious.iterdir()) == []
        assert _mode(precious) == 0o700
        planted.unlink()


@pytest.mark.parametrize(("name", "use"), FILES)
def test_a_file_that_leads_elsewhere_is_refused(
    data: Path, victim: Path, name: str, use: Callable[[Path], None]
) -> None:
    """Of what `up` writes and reads itself, no link at all is followed, symbolic or hard, and no pipe is waited for."""
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
def test_a_file_of_somebody_else_is_refused(data: Path, name: str, use: Callable[[Path], None]) -> None:
    """A file that somebody else has prepared is refused with its owner's name, and neither read nor written."""
    planted = data / name
    planted.parent.mkdir(exist_ok=True)
    planted.write_text("theirs", encoding="ascii")
    _assert_refused(planted, data, use)
    assert planted.read_text(encoding="ascii") == "theirs"


@needs_root
@pytest.mark.parametrize(("name", "use"), [(".", _use), *FOLDERS])
def test_a_folder_of_somebody_else_is_refused(data: Path, name: str, use: Callable[[Path], None]) -> None:
    """A folder that somebody else has prepared is refused with its owner's name, and nothing is made in it."""
    planted = data / name
    planted.mkdir(parents=True, exist_ok=True)
    _assert_refused(planted, data, use)
    assert list(planted.iterdir()) == []


def _assert_refused(planted: Path, data: Path, use: Callable[[Path], None]) -> None:
    planted.chmod(0o755)
    os.chown(planted, SOMEBODY, SOMEBODY)
    with pytest.raises(StartError, match=rf"{planted} .*belongs to uid {SOMEBODY}[:;] "):
        use(data)
    assert (planted.stat().st_uid, _mode(planted)) == (SOMEBODY, 0o755)


def test_an_unfinished_file_that_somebody_left_is_made_anew(data: Path, victim: Path) -> None:
    """The key is written to a file that was not there before: a link in its place is removed, not followed."""
    (data / "secret_key.unfinished").symlink_to(victim)
    with locked_folder(data) as folder:
        assert len(folder.secret_key()) == 64
    assert not (data / "secret_key").is_symlink()


def test_a_list_that_everybody_may_write_to_ends_no_process(data: Path) -> None:
    """Processes are ended only because of a list that nobody else may have written to; what is no entry is skipped."""
    with _sleeper() as sleeper, locked_folder(data) as folder:
        folder.record_process("relay", sleeper)
        planted = data / "processes.jsonl"
        planted.chmod(0o666)
        with pytest.raises(StartError, match=f"{planted}.*everybody may write to it"):
            folder.stop_leftovers(lambda _: None)
        assert sleeper.poll() is None

        started = psutil.Process(sleeper.pid).create_time()
        strange = [{"name": "sshd", "pid": sleeper.pid, "started": started}, [], {"name": "relay"}]
        strange += [{"name": "relay", "pid": pid, "started": started} for pid in (-1, 2**80, "1", None)]
        planted.write_text("".join(f"{json.dumps(entry)}\n" for entry in strange), encoding="utf-8")
        planted.chmod(0o600)
        folder.stop_leftovers(lambda _: None)
        assert sleeper.poll() is None
        assert not planted.exists()


def test_a_folder_that_is_exchanged_is_not_used(data: Path, tmp_path: Path) -> None:
    """What is written after the folder was opened lands in that folder, whatever is at its path by then."""
    with locked_folder(data) as folder, catch_mails(folder.mails), _sleeper() as sleeper:
        data.rename(tmp_path / "away")
        data.mkdir()
        folder.secret_key()
        folder.record_process("relay", sleeper)
        assert list(data.iterdir()) == []
    assert (tmp_path / "away" / "secret_key").exists()


def test_an_own_link_may_lead_to_the_data(data: Path, tmp_path: Path) -> None:
    """A link of this user's to a folder of this user's is followed, whole paths and steps back among them."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "near").symlink_to("../data")
    (tmp_path / "link").symlink_to(tmp_path / "other" / "near")
    with locked_folder(tmp_path / "other" / ".." / "link") as folder:
        assert folder.path == data.resolve()
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(StartError, match="cannot be used"), locked_folder(tmp_path / "round"):
        pass


@needs_root
def test_anothers_link_to_a_folder_of_ours_is_refused(data: Path, tmp_path: Path) -> None:
    """A link is refused if somebody else made it, or has a folder in which to put links that others made."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "ours").symlink_to(data)
    (tmp_path / "link").symlink_to(data)
    for planted in (theirs, tmp_path / "link"):
        os.chown(planted, SOMEBODY, SOMEBODY, follow_symlinks=False)
    for link in (theirs / "ours", tmp_path / "link"):
        with pytest.raises(StartError, match=f"{link} is a symbolic link"), locked_folder(link / "below"):
            pass
    assert list(data.iterdir()) == []


def test_a_parent_that_everybody_may_write_to_is_refused(tmp_path: Path) -> None:
    """In a folder such as /tmp the data folder is safe; without the sticky bit anybody could exchange it."""
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(0o777)
    with (
        pytest.raises(StartError, match=f"everybody may write to {parent}: chmod o-w {parent}"),
        locked_folder(parent / "data"),
    ):
        pass
    assert list(parent.iterdir()) == []
    parent.chmod(0o1777)
    with locked_folder(parent / "data"):
        pass


def test_sockets_are_for_their_user_alone(tmp_path: Path) -> None:
    """Whatever the umask, nobody else may connect."""
    before = os.umask(0)
    try:
        with embedded_redis(tmp_path):
            assert _mode(tmp_path / "redis.sock") == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mode", "refused"), [(0o1777, False), (0o777, True)])
def test_sockets_that_need_a_short_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    refused: bool,  # noqa: FBT001 - pytest passes it
) -> None:
    """They are in a folder of this user's in TMPDIR, where nobody else may exchange it."""
    with tempfile.TemporaryDirectory() as shared:
        monkeypatch.setattr(tempfile, "tempdir", shared)
        Path(shared).chmod(mode)
        expected = pytest.raises(StartError, match=f"may write to {shared}:") if refused else nullcontext()
        with expected, embedded_redis(tmp_path / ("long" * 20)) as server:
            assert server.url.startswith(f"unix://{shared}/outbox-")
        assert list(Path(shared).iterdir()) == []


@pytest.mark.parametrize("mode", [0o775, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to(data: Path, mode: int) -> None:
    """It is closed to them if it is empty or was a data folder before; any other is refused and stays as it is."""
    for content in (None, "lock"):
        if content:
            (data / content).touch()
        data.chmod(mode)
        with locked_folder(data):
            assert _mode(data) & 0o022 == 0
    (data / "lock").rename(data / "shared")
    data.chmod(mode)
    with pytest.raises(StartError, match=f"chmod go-w {data}, or"), locked_folder(data):
        pass
    assert _mode(data) == mode
    assert [path.name for path in data.iterdir()] == ["shared"]


def test_an_earlier_versions_folder_is_closed_to_others(tmp_path: Path) -> None:
    """Files are for their owner alone, whatever the umask and however they were made; folders cannot be listed."""
    before = os.umask(0)
    try:
        data = tmp_path / "new" / "data"
        for _ in range(2):
            _use(data)
            _redis(data)
            files = {path.name: path for path in data.rglob("*") if path.is_file()}
            assert {"lock", "secret_key", "processes.jsonl", "redis.log"} == set(files)
            assert {_mode(path) for path in files.values()} == {0o600}
            assert {_mode(folder) & 0o066 for folder in (data / "mails", data / "redis")} == {0}
            assert _mode(data.parent) & 0o022 == 0
            for path in files.values():
                path.chmod(0o664)
            for folder in (data / "mails", data / "redis"):
                folder.chmod(0o755)
    finally:
        os.umask(before)
