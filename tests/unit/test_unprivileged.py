"""What `outbox up` hands over and opens to the user that Postgres runs as, where this one is root."""

import os
import stat
from pathlib import Path

import pytest

from outbox.devstack.unprivileged import is_root, make_own, make_searchable
from outbox.errors import StartError

pytestmark = pytest.mark.skipif(not is_root(), reason="needs root, who alone hands anything over")


def test_root_hands_over_no_file_with_a_second_name(tmp_path: Path) -> None:
    """Postgres' user gets what is in the data folder, links themselves but nothing that they lead to."""
    victim, data = tmp_path / "victim", tmp_path / "data"
    victim.touch()
    (data / "below").mkdir(parents=True)
    (data / "below" / "symbolic").symlink_to(victim)
    make_own(data)
    assert {path.lstat().st_uid for path in (data, data / "below", data / "below" / "symbolic")} == {data.stat().st_uid}
    assert data.stat().st_uid != 0
    os.chown(data, 0, 0)
    (data / "below" / "hard").hardlink_to(victim)
    with pytest.raises(StartError, match=r"hard somewhere in .* is a hard link to another file"):
        make_own(data)
    assert victim.stat().st_uid == 0


def test_root_opens_nobody_elses_folder(tmp_path: Path) -> None:
    """A folder of somebody else above Postgres' data keeps its mode; the sentence says whose it is."""
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
