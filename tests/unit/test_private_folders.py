"""`outbox up` uses no data folder that belongs to another user, or that another user may write to or replace."""

import os
from pathlib import Path

import pytest

from outbox.devstack.data_folder import locked_folder
from outbox.errors import StartError
from tests.support.data_folders import FOLDERS, OTHER_UID, Use, mode_of, needs_root, use_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An existing data folder."""
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    return folder


@needs_root
@pytest.mark.parametrize(("name", "use"), [(".", use_data), *FOLDERS])
def test_a_folder_of_somebody_else_is_refused(data: Path, name: str, use: Use) -> None:
    """The error names the owner, and nothing is created in the folder."""
    planted = data / name
    planted.mkdir(parents=True, exist_ok=True)
    planted.chmod(0o755)
    os.chown(planted, OTHER_UID, OTHER_UID)
    with pytest.raises(StartError, match=rf"{planted} .*belongs to uid {OTHER_UID}: "):
        use(data)
    assert (planted.stat().st_uid, mode_of(planted)) == (OTHER_UID, 0o755)
    assert list(planted.iterdir()) == []


def test_a_link_of_this_user_is_followed(data: Path, tmp_path: Path) -> None:
    """Absolute and relative targets and `..` work; a link to itself is an error."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "near").symlink_to("../data")
    (tmp_path / "link").symlink_to(tmp_path / "other" / "near")
    with locked_folder(tmp_path / "other" / ".." / "link") as folder:
        assert folder.path == data.resolve()
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(StartError, match="cannot be used"), locked_folder(tmp_path / "round"):
        pass


@needs_root
def test_a_link_of_another_user_to_the_data_folder_is_refused(data: Path, tmp_path: Path) -> None:
    """A link is refused if another user created it or owns the folder it is in."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "ours").symlink_to(data)
    (tmp_path / "link").symlink_to(data)
    for planted in (theirs, tmp_path / "link"):
        os.chown(planted, OTHER_UID, OTHER_UID, follow_symlinks=False)
    for link in (theirs / "ours", tmp_path / "link"):
        with pytest.raises(StartError, match=f"{link} is a symbolic link"), locked_folder(link / "below"):
            pass
    assert list(data.iterdir()) == []


def test_a_parent_that_everybody_may_write_to_is_refused(tmp_path: Path) -> None:
    """Everybody could replace the data folder in it, unless it has the sticky bit, as /tmp has."""
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(0o777)
    refused = pytest.raises(StartError, match=f"everybody may write to {parent}: chmod o-w {parent}")
    with refused, locked_folder(parent / "data"):
        pass
    assert list(parent.iterdir()) == []
    parent.chmod(0o1777)
    with locked_folder(parent / "data"):
        pass


@pytest.mark.parametrize("mode", [0o775, 0o777, 0o1777])
def test_only_a_data_folder_is_closed_to_others(data: Path, mode: int) -> None:
    """A folder that others may write to is closed if it is empty or was a data folder; any other is refused."""
    for content in (None, "lock"):
        if content:
            (data / content).touch()
        data.chmod(mode)
        with locked_folder(data):
            assert mode_of(data) & 0o022 == 0
    (data / "lock").rename(data / "shared")
    data.chmod(mode)
    with pytest.raises(StartError, match=f"chmod go-w {data}, or"), locked_folder(data):
        pass
    assert mode_of(data) == mode
    assert [path.name for path in data.iterdir()] == ["shared"]
