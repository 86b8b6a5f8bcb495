"""Postgres refuses to run as root: as whom it runs then, and what that user must be able to reach."""

import os
import pwd
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from outbox import logs
from outbox.errors import StartError

_USER = "nobody"


def is_root() -> bool:
    """Returns whether this process runs as root."""
    return os.geteuid() == 0


def make_own(folder: Path) -> Mapping[str, Any]:
    """Says as whom Postgres runs on a data folder, and hands the folder over where it is root's.

    A folder that an ordinary user has made stays that user's, so that both may run `outbox up` on it.

    Args:
        folder: an existing folder.

    Returns:
        `subprocess.Popen`'s arguments; none unless this process is root.

    Raises:
        StartError: the folder is another user's, or there is no unprivileged user to hand it to.
    """
    owner = folder.stat().st_uid
    if not is_root():
        if owner != os.geteuid():
            raise StartError(f"{folder} is another user's (uid {owner}): choose another folder with --data")
        return {}
    if owner == 0:
        try:
            nobody = pwd.getpwnam(_USER)
        except KeyError:
            raise StartError(f"Postgres does not run as root, and this system has no user {_USER!r}") from None
        for path in (folder, *folder.rglob("*")):
            os.chown(path, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)
    status = folder.stat()
    return {"user": status.st_uid, "group": status.st_gid, "extra_groups": []}


def make_searchable(path: Path) -> None:
    """Lets everybody pass through (not list) the folders above a path, and logs those that it changed.

    Args:
        path: an absolute path without links.
    """
    for folder in path.parents:
        mode = stat.S_IMODE(folder.stat().st_mode)
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)
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
