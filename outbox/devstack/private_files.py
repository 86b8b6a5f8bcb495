"""Private folders of this user and their files: opens nothing that another user may have put there."""

import os
import pwd
import shlex
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from outbox.errors import StartError

_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_PASS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
"""O_PATH opens folders that this user may pass through but not list; where the system lacks it, they are refused."""
_MOST_LINKS = 40
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
LOCK = "lock"
"""What tells a data folder from any other folder of this user."""


class PrivateFolder:
    """A private folder of this user, held open, so that no other user can replace it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        """Absolute and without links."""
        self.descriptor = descriptor

    def open(self, name: str, flags: int) -> int:
        """Opens a file that is this user's alone, closes it to others if need be, and returns its descriptor.

        Args:
            name: without a folder.
            flags: as of `os.open`, without O_TRUNC, which would empty the file before it is checked.

        Raises:
            StartError: it cannot be opened, is another user's, or leads elsewhere; or it is to be read, and
                everybody may have written to it.
        """
        try:
            # O_NONBLOCK: does not wait for a planted pipe, and makes no difference to plain files.
            descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=self.descriptor)
        except OSError as error:
            if status := _status(name, self.descriptor):
                self._check(name, status)
            raise StartError(f"{self.path / name} cannot be used: {error.strerror}") from error
        try:
            status = os.fstat(descriptor)
            self._check(name, status, is_read=flags & os.O_ACCMODE == os.O_RDONLY)
            if status.st_mode & 0o077:
                os.fchmod(descriptor, status.st_mode & 0o700)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def open_log(self, name: str) -> IO[bytes]:
        """Opens a file as `open` does, and empties it: to append to, by several processes, and to read.

        Raises:
            StartError: as of `open`.
        """
        descriptor = self.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.ftruncate(descriptor, 0)
        return os.fdopen(descriptor, "r+b", buffering=0)

    def has(self, name: str) -> bool:
        """Returns whether the name exists, also as a dangling link."""
        return _status(name, self.descriptor) is not None

    def rename(self, old: str, new: str) -> None:
        """Gives something in it another name.

        Raises:
            OSError: as of `os.rename`.
        """
        os.rename(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def remove(self, name: str) -> None:
        """Removes a file, if there is one.

        Raises:
            OSError: as of `os.unlink`.
        """
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def _check(self, name: str, status: os.stat_result, *, is_read: bool = False) -> None:
        why = _why_not_private(status)
        if is_read and status.st_mode & stat.S_IWOTH:
            why = why or "everybody may write to it"
        if why:
            raise StartError(
                f"{self.path / name} cannot be used: {why}; remove it, or choose another folder with --data"
            )


@contextmanager
def private_folder(path: Path, *, listable: bool = False) -> Iterator[PrivateFolder]:
    """Opens a folder of this user's until the block is left; makes it if need be, and closes it to others.

    As root, others may pass through it: Postgres does not run as root.

    Args:
        path: may be a link of this user's or root's.
        listable: let others list a folder that was there before: it may have further uses.

    Raises:
        StartError: it is another user's, others may write to it or exchange it, or it cannot be opened or made.
    """
    with ExitStack() as opened:
        try:
            folder = _opened(path, opened, 0o711 if os.geteuid() == 0 else 0o700, listable=listable)
        except OSError as error:
            raise StartError(f"the data folder {path} cannot be used: {error.strerror}") from error
        yield folder


def _opened(path: Path, opened: ExitStack, mode: int, *, listable: bool) -> PrivateFolder:
    with walk(path, mode) as way:
        real, passing = way[-1]
        owner = os.fstat(passing).st_uid
        if owner != os.geteuid():
            raise StartError(
                f"the data folder {real} belongs to {name_of(owner)}:"
                " run this as that user, or choose another folder with --data"
            )
        descriptor = os.open(".", _LIST, dir_fd=passing)
    opened.callback(os.close, descriptor)
    found = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if found & _OTHERS_WRITE and not _is_ours(descriptor):
        raise StartError(
            f"the data folder {real} is not safe from others, because they may write to it:"
            f" chmod go-w {shlex.quote(str(real))}, or choose another folder with --data"
        )
    wanted = found & (mode | 0o7700 | (0o055 if listable else 0))
    if wanted != found:
        os.fchmod(descriptor, wanted)
    return PrivateFolder(real, descriptor)


def _is_ours(descriptor: int) -> bool:
    """Whether a folder is empty or was a data folder before: nobody else counts on writing to it."""
    lock = _status(LOCK, descriptor)
    return not os.listdir(descriptor) or (lock is not None and not _why_not_private(lock))


def _why_not_private(status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return "it is a symbolic link"
    if not stat.S_ISREG(status.st_mode):
        return "it is no plain file"
    if status.st_uid != os.geteuid():
        return f"it belongs to {name_of(status.st_uid)}"
    return "it is a hard link to another file" if status.st_nlink > 1 else ""


@contextmanager
def walk(path: Path, mode: int | None = None) -> Iterator[list[tuple[Path, int]]]:
    """Opens all folders from the root to a path, each relative to the one above.

    Args:
        path: its links are followed where nobody but this user and root could have made them.
        mode: makes the folders that are missing, the last with this mode; in none that everybody may write to, unless
            it is as /tmp.

    Yields:
        Every folder without links, and a descriptor to pass through it, until the block is left.

    Raises:
        StartError: another user could have made one of the links, or could replace a folder that is to be made.
        OSError: a folder is missing or cannot be opened or made.
    """
    with ExitStack() as opened:

        def enter(name: str, above: int | None) -> int:
            descriptor = os.open(name, _PASS, dir_fd=above)
            opened.callback(os.close, descriptor)
            return descriptor

        way = [(Path("/"), enter("/", None))]
        todo = deque((Path.cwd() / path).parts[1:])
        links = 0
        while todo:
            name = todo.popleft()
            above, descriptor = way[-1]
            status = _status(name, descriptor)
            if name == "..":
                del way[max(1, len(way) - 1) :]
            elif status is not None and stat.S_ISLNK(status.st_mode) and links < _MOST_LINKS:
                links += 1
                if not _is_trusted_link(status, os.fstat(descriptor)):
                    raise StartError(
                        f"{above / name} is a symbolic link that somebody else may have put there:"
                        " remove it, or name another folder with --data"
                    )
                target = Path(os.readlink(name, dir_fd=descriptor))
                todo.extendleft(reversed(target.parts[1:] if target.is_absolute() else target.parts))
                del way[1 if target.is_absolute() else len(way) :]
            else:
                if mode is not None and _is_anybodys(os.fstat(descriptor)):
                    raise StartError(
                        f"the data folder {path} is not safe from others, because everybody may write to {above}:"
                        f" chmod o-w {shlex.quote(str(above))}, or choose another folder with --data"
                    )
                if mode is not None and status is None:
                    with suppress(FileExistsError):
                        os.mkdir(name, 0o755 if todo else mode, dir_fd=descriptor)
                way.append((above / name, enter(name, descriptor)))
        yield way


def _is_trusted_link(link: os.stat_result, folder: os.stat_result) -> bool:
    """Whether nobody but this user and root could have put a link into a folder, by whatever means."""
    ours = {0, os.geteuid()}
    return link.st_uid in ours and link.st_nlink == 1 and folder.st_uid in ours and not _is_anybodys(folder)


def _is_anybodys(folder: os.stat_result) -> bool:
    """Whether everybody may exchange what is in a folder: the sticky bit leaves that to the owners."""
    return folder.st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH


def name_of(user: int) -> str:
    """Returns what to call a user: the name, where there is one, and the number."""
    try:
        return f"{pwd.getpwuid(user).pw_name} (uid {user})"
    except KeyError:
        return f"uid {user}"


def _status(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
