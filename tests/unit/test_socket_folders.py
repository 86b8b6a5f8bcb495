"""Only this user may connect to the sockets of the embedded servers."""

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from outbox.devstack.embedded import embedded_redis
from outbox.errors import StartError
from tests.support.data_folders import mode_of


def test_a_socket_is_closed_to_others(tmp_path: Path) -> None:
    """Whatever the umask, no other user may connect."""
    before = os.umask(0)
    try:
        with embedded_redis(tmp_path):
            assert mode_of(tmp_path / "redis.sock") == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mode", "is_refused"), [(0o1777, False), (0o777, True)])
def test_a_socket_whose_path_would_be_too_long(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    is_refused: bool,  # noqa: FBT001 - pytest passes it
) -> None:
    """It is in a folder in TMPDIR, which is refused if another user could replace that folder."""
    with tempfile.TemporaryDirectory() as shared:
        monkeypatch.setattr(tempfile, "tempdir", shared)
        Path(shared).chmod(mode)
        expected = pytest.raises(StartError, match=f"may write to {shared}:") if is_refused else nullcontext()
        with expected, embedded_redis(tmp_path / ("long" * 20)) as server:
            assert server.url.startswith(f"unix://{shared}/outbox-")
        assert list(Path(shared).iterdir()) == []
