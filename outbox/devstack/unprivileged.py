"""Runs Postgres as another user, because it refuses to run as root, and gives that user access to its files."""

import os
import pwd
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from outbox.devstack.trusted_paths import open_path, user_name
from outbox.errors import StartError
from outbox.runtime import logs

_USER = "nobody"


def is_root() -> bool:
    """Returns whether this process runs as root."""
    return os.geteuid() == 0


def chown_to_unprivileged(folder: Path) -> Mapping[str, Any]:
    """Gives a folder of root to the user that Postgres runs as; unless this process is root, only checks the owner.

    Args:
        folder: an existing folder.

    Returns:
        The arguments of `subprocess.Popen` that set this user; none unless this process is root.

    Raises:
        StartError: the folder belongs to another user or cannot be reached, a file in it is a hard link, or the
            unprivileged user does not exist.
    """
    user = _unprivileged() if is_root() else None
    with open_path(folder) as folders:
        resolved, descriptor = folders[-1]
        owner = os.fstat(descriptor).st_uid
        if user is not None and owner == 0:
            _chown(resolved, descriptor, user)
        elif owner != (os.geteuid() if user is None else user.pw_uid):
            raise StartError(f"{resolved} belongs to {user_name(owner)}: choose another folder with --data")
    if user is None:
        return {}
    make_searchable(folder)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _unprivileged() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(_USER)
    except KeyError:
        raise StartError(f"Postgres does not run as root, and this system has no user {_USER!r}") from None


def _chown(resolved: Path, descriptor: int, user: pwd.struct_passwd) -> None:
    for name, _, status in _content(descriptor):
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            raise StartError(f"{name} somewhere in {resolved} is a hard link to another file: remove it")
    for name, folder, _ in _content(descriptor):
        os.chown(name, user.pw_uid, user.pw_gid, dir_fd=folder, follow_symlinks=False)
    # Last: until here only root may write to the folder.
    os.chown(".", user.pw_uid, user.pw_gid, dir_fd=descriptor)


def _content(descriptor: int) -> Iterator[tuple[str, int, os.stat_result]]:
    """Yields every file and folder below a folder: its name, a descriptor of its folder, and its status."""
    for _, folders, files, folder in os.fwalk(".", topdown=False, dir_fd=descriptor):
        for name in (*folders, *files):
            yield name, folder, os.stat(name, dir_fd=folder, follow_symlinks=False)


def make_searchable(*paths: Path) -> None:
    """Lets everybody search (not list) the folders of root above some paths, and logs what it changed.

    Args:
        paths: of existing folders.

    Raises:
        StartError: a folder that not everybody may search belongs to another user.
    """
    for path in paths:
        with open_path(path) as folders:
            for folder, descriptor in folders[:-1]:
                _make_searchable(folder, descriptor)


def _make_searchable(folder: Path, descriptor: int) -> None:
    status = os.fstat(descriptor)
    if status.st_mode & stat.S_IXOTH:
        return
    if status.st_uid != os.geteuid():
        raise StartError(
            f"Postgres does not run as root and cannot pass through {folder}, which belongs to"
            f" {user_name(status.st_uid)}: run this as that user, or chmod o+x {shlex.quote(str(folder))}"
        )
    os.chmod(".", stat.S_IMODE(status.st_mode) | stat.S_IXOTH, dir_fd=descriptor)
    logs.get().warning("made a folder searchable", folder=str(folder), reason="Postgres does not run as root")


def check_readable(trees: Sequence[Path]) -> None:
    """Checks that everybody may read and run what the owner of an installation may.

    Args:
        trees: the folders of the installation: absolute paths without links.

    Raises:
        StartError: a file or folder is closed to others, as after an installation under a strict umask.
    """
    for path in (path for tree in trees for path in (tree, *tree.rglob("*"))):
        mode = path.lstat().st_mode
        if not stat.S_ISLNK(mode) and (mode & (stat.S_IRUSR | stat.S_IXUSR)) >> 6 & ~mode:
            raise StartError(
                f"Postgres does not run as root, and as {_USER!r} it may not read {path}:"
                f" run this as another user, or chmod -R go+rX {shlex.join(map(str, trees))}"
            )
