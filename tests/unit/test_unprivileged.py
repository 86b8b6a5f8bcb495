"""As root, `outbox up` gives the user that Postgres runs as access to its files and to no others."""

import os
import stat
from pathlib import Path

import pytest

from outbox.devstack.unprivileged import check_readable, chown_to_unprivileged, is_root, make_searchable
from outbox.errors import StartError

pytestmark = pytest.mark.skipif(not is_root(), reason="needs root")


def test_hard_links_are_not_given_away(tmp_path: Path) -> None:
    """Postgres' user gets files and symbolic links in the data folder, not their targets; a hard link is refused."""
    victim, data = tmp_path / "victim", tmp_path / "data"
    victim.touch()
    (data / "below").mkdir(parents=True)
    (data / "below" / "symbolic").symlink_to(victim)
    chown_to_unprivileged(data)
    assert {path.lstat().st_uid for path in (data, data / "below", data / "below" / "symbolic")} == {data.stat().st_uid}
    assert data.stat().st_uid != 0
    os.chown(data, 0, 0)
    (data / "below" / "hard").hardlink_to(victim)
    with pytest.raises(StartError, match=r"hard somewhere in .* is a hard link to another file"):
        chown_to_unprivileged(data)
    assert victim.stat().st_uid == 0


def test_only_folders_of_root_become_searchable(tmp_path: Path) -> None:
    """Another user's folder above Postgres' data keeps its mode; the error names the folder and its owner."""
    closed = tmp_path / "closed"
    (closed / "data").mkdir(parents=True)
    closed.chmod(0o700)
    make_searchable(closed / "data")
    assert stat.S_IMODE(closed.stat().st_mode) == 0o701
    closed.chmod(0o700)
    os.chown(closed, 54321, 54321)
    with pytest.raises(StartError, match=f"{closed}, which belongs to uid {54321}.* chmod o\\+x {closed}"):
        make_searchable(closed / "data")
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


def test_a_closed_installation_is_refused_and_stays_closed(tmp_path: Path) -> None:
    """The error names the file that Postgres' user may not read, and the command that opens the installation."""
    programs, libraries = tmp_path / "pginstall", tmp_path / "a b.libs"
    for folder in (programs, libraries):
        folder.mkdir(mode=0o755)
    library = libraries / "libpq.so"
    library.touch(mode=0o644)
    (libraries / "dangling").symlink_to("nowhere")
    check_readable([programs, libraries])
    for path, mode in ((library, 0o600), (libraries, 0o700)):
        path.chmod(mode)
        with pytest.raises(StartError, match=f"may not read {path}: .* chmod -R go\\+rX {programs} '{libraries}'$"):
            check_readable([programs, libraries])
        assert stat.S_IMODE(path.stat().st_mode) == mode
