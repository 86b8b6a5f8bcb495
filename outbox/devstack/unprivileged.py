"""Postgres refuses to run as root: the user that it runs as then, and what that user must be able to reach."""

import os
import pwd
import shlex
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from outbox.devstack.private_files import name_of, walk
from outbox.errors import StartError
from outbox.runtime import logs

_USER = "nobody"


def is_root() -> bool:
    """Returns whether this process runs as root."""
    return os.geteuid() == 0


def make_own(folder: Path) -> Mapping[str, Any]:
    """Returns the user that Postgres runs as on a data folder, and gives that user the folder if it is root's.

    Args:
        folder: an existing folder.

    Returns:
        `subprocess.Popen`'s arguments; none unless this process is root.

    Raises:
        StartError: the folder is another user's, a file in it has a second name that may be elsewhere, or there is no
            unprivileged user to hand it to.
    """
    user = _unprivileged() if is_root() else None
    with walk(folder) as way:
        real, descriptor = way[-1]
        owner = os.fstat(descriptor).st_uid
        if user is not None and owner == 0:
            _hand_over(real, descriptor, user)
        elif owner != (os.geteuid() if user is None else user.pw_uid):
            raise StartError(f"{real} belongs to {name_of(owner)}: choose another folder with --data")
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _unprivileged() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(_USER)
    except KeyError:
        raise StartError(f"Postgres does not run as root, and this system has no user {_USER!r}") from None


def _hand_over(real: Path, descriptor: int, user: pwd.struct_passwd) -> None:
    for name, _, status in _content(descriptor):
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            raise StartError(f"{name} somewhere in {real} is a hard link to another file: remove it")
    for name, folder, _ in _content(descriptor):
        os.chown(name, user.pw_uid, user.pw_gid, dir_fd=folder, follow_symlinks=False)
    # Last: nobody else may write to it before.
    os.chown(".", user.pw_uid, user.pw_gid, dir_fd=descriptor)


def _content(descriptor: int) -> Iterator[tuple[str, int, os.stat_result]]:
    """Yields all that is in a folder and below, as a name in an open folder."""
    for _, folders, files, folder in os.fwalk(".", topdown=False, dir_fd=descriptor):
        for name in (*folders, *files):
            yield name, folder, os.stat(name, dir_fd=folder, follow_symlinks=False)


def make_searchable(path: Path) -> None:
    """Lets everybody pass through (not list) root's folders above a path, and logs those that it changed.

    Args:
        path: of an existing folder.

    Raises:
        StartError: a folder that others may not pass through is another user's.
    """
    with walk(path) as way:
        for folder, descriptor in way[:-1]:
            status = os.fstat(descriptor)
            if status.st_mode & stat.S_IXOTH:
                continue
            if status.st_uid != os.geteuid():
                raise StartError(
                    f"Postgres does not run as root and cannot pass through {folder}, which belongs to"
                    f" {name_of(status.st_uid)}: run this as that user, or chmod o+x {shlex.quote(str(folder))}"
                )
            os.chmod(".", stat.S_IMODE(status.st_mode) | stat.S_IXOTH, dir_fd=descriptor)
            logs.get().warning("made a folder searchable", folder=str(folder), reason="Postgres does not run as root")


def make_readable(trees: Iterable[Path]) -> None:
    """Lets everybody read an installation from a public wheel: under a strict umask only root could.

    Args:
        trees: absolute paths without links.
    """
    for tree in trees:
        changed = 0
        for path in (tree, *tree.rglob("*")):
            if path.is_symlink():
                continue
            mode = stat.S_IMODE(path.stat().st_mode)
            # What its owner may read or run, everybody may.
            wanted = mode | (mode & (stat.S_IRUSR | stat.S_IXUSR)) >> 6
            if wanted != mode:
                path.chmod(wanted)
                changed += 1
        if changed:
            logs.get().warning(
                "made an installation readable", folder=str(tree), files=changed, reason="Postgres does not run as root"
            )
