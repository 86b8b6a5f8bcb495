"""Opens folders along a path and follows no link that another user may have created."""

import os
import pwd
import shlex
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from outbox.errors import StartError

_TO_SEARCH = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
"""O_PATH opens folders that this user may search but not list. Systems without it refuse them."""
_MAX_LINKS = 40


@contextmanager
def open_path(path: Path, mode: int | None = None) -> Iterator[list[tuple[Path, int]]]:
    """Opens every folder from the root to a path, each relative to its parent.

    Args:
        path: its links are followed if only this user or root can have created them.
        mode: creates missing folders, the last one with this mode. No folder on the way may then be writable for
            everybody, unless it has the sticky bit, as /tmp has.

    Yields:
        For each folder, until the block is left, its path without links and a descriptor that can search it.

    Raises:
        StartError: another user may have created one of the links, or could replace a folder on the way.
        OSError: a folder does not exist, or cannot be opened or created.
    """
    with ExitStack() as opened:

        def enter(name: str, parent: int | None) -> int:
            descriptor = os.open(name, _TO_SEARCH, dir_fd=parent)
            opened.callback(os.close, descriptor)
            return descriptor

        folders = [(Path("/"), enter("/", None))]
        names = deque((Path.cwd() / path).parts[1:])
        links = 0
        while names:
            name = names.popleft()
            parent, descriptor = folders[-1]
            status = status_of(name, descriptor)
            if name == "..":
                del folders[max(1, len(folders) - 1) :]
            elif status is not None and stat.S_ISLNK(status.st_mode) and links < _MAX_LINKS:
                links += 1
                if not _is_trusted_link(status, os.fstat(descriptor)):
                    raise StartError(
                        f"{parent / name} is a symbolic link that another user may have created:"
                        " remove it, or choose another folder with --data"
                    )
                target = Path(os.readlink(name, dir_fd=descriptor))
                names.extendleft(reversed(target.parts[1:] if target.is_absolute() else target.parts))
                del folders[1 if target.is_absolute() else len(folders) :]
            else:
                if mode is not None and _is_open_to_all(os.fstat(descriptor)):
                    raise StartError(
                        f"the data folder {path} could be replaced, because everybody may write to {parent}:"
                        f" chmod o-w {shlex.quote(str(parent))}, or choose another folder with --data"
                    )
                if mode is not None and status is None:
                    with suppress(FileExistsError):
                        os.mkdir(name, 0o755 if names else mode, dir_fd=descriptor)
                folders.append((parent / name, enter(name, descriptor)))
        yield folders


def _is_trusted_link(link: os.stat_result, folder: os.stat_result) -> bool:
    """Whether only this user and root can have put a link into a folder, in any way."""
    trusted = {0, os.geteuid()}
    return link.st_uid in trusted and link.st_nlink == 1 and folder.st_uid in trusted and not _is_open_to_all(folder)


def _is_open_to_all(folder: os.stat_result) -> bool:
    """Whether everybody may replace the files in a folder; the sticky bit reserves that for their owners."""
    return folder.st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH


def user_name(uid: int) -> str:
    """Returns the name of a user, if it has one, and the uid."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def status_of(name: str, folder: int) -> os.stat_result | None:
    """Returns the status of a name in an open folder, of a link itself; None if the name does not exist."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
