"""Opens folders and files that belong to this user, and none that another user may have created or replaced."""

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

_TO_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_TO_SEARCH = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
"""O_PATH opens folders that this user may search but not list. Systems without it refuse them."""
_MAX_LINKS = 40
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
LOCK = "lock"
"""The file that marks a folder as a data folder."""


class PrivateFolder:
    """A private folder of this user, kept open, so that no other user can replace it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        """Absolute and without links."""
        self.descriptor = descriptor

    def open(self, name: str, flags: int) -> int:
        """Opens a file, makes it accessible to this user alone, and returns its descriptor.

        Args:
            name: without a folder.
            flags: as of `os.open`, without O_TRUNC, which would empty the file before it is checked.

        Raises:
            StartError: the file cannot be opened, belongs to another user or is a link; or `flags` only read it and
                everybody may have written to it.
        """
        try:
            # O_NONBLOCK: does not wait for a planted pipe, and has no effect on regular files.
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
        """Opens a file as `open` does and empties it; several processes may append to it.

        Raises:
            StartError: as of `open`.
        """
        descriptor = self.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.ftruncate(descriptor, 0)
        return os.fdopen(descriptor, "r+b", buffering=0)

    def read(self, name: str) -> str:
        """Returns the text of a file; bytes that are not UTF-8 are replaced.

        Raises:
            StartError: as of `open`.
            OSError: the file cannot be read.
        """
        with os.fdopen(self.open(name, os.O_RDONLY), encoding="utf-8", errors="replace") as file:
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        """Writes a new file, which gets its name when it is complete.

        Raises:
            StartError: as of `open`.
            OSError: the file cannot be written.
        """
        unfinished = f"{name}.unfinished"
        self.remove(unfinished)
        with os.fdopen(self.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(content)
        self.rename(unfinished, name)

    def has(self, name: str) -> bool:
        """Returns whether the name exists, even as a dangling link."""
        return _status(name, self.descriptor) is not None

    def rename(self, old: str, new: str) -> None:
        """Renames a file or folder in this folder.

        Raises:
            OSError: as of `os.rename`.
        """
        os.rename(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def remove(self, name: str) -> None:
        """Removes a file if it exists.

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
    """Opens a folder of this user until the block is left; creates it if necessary, and closes it to other users.

    If this process is root, others may search the folder, because Postgres runs as another user.

    Args:
        path: may be a link that this user or root created.
        listable: leaves others the right to list an existing folder, which may have other uses.

    Raises:
        StartError: the folder belongs to another user, others may write to it or replace it, or it cannot be opened or
            created.
    """
    with ExitStack() as opened:
        try:
            folder = _open_folder(path, opened, 0o711 if os.geteuid() == 0 else 0o700, listable=listable)
        except OSError as error:
            raise StartError(f"the data folder {path} cannot be used: {error.strerror}") from error
        yield folder


def _open_folder(path: Path, opened: ExitStack, mode: int, *, listable: bool) -> PrivateFolder:
    with open_path(path, mode) as folders:
        resolved, searchable = folders[-1]
        owner = os.fstat(searchable).st_uid
        if owner != os.geteuid():
            raise StartError(
                f"the data folder {resolved} belongs to {user_name(owner)}:"
                " run this as that user, or choose another folder with --data"
            )
        descriptor = os.open(".", _TO_LIST, dir_fd=searchable)
    opened.callback(os.close, descriptor)
    old_mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if old_mode & _OTHERS_WRITE and not _is_data_folder(descriptor):
        raise StartError(
            f"other users may write to the data folder {resolved}:"
            f" chmod go-w {shlex.quote(str(resolved))}, or choose another folder with --data"
        )
    new_mode = old_mode & (mode | 0o7700 | (0o055 if listable else 0))
    if new_mode != old_mode:
        os.fchmod(descriptor, new_mode)
    return PrivateFolder(resolved, descriptor)


def _is_data_folder(descriptor: int) -> bool:
    """Whether a folder is empty or was a data folder before, so that closing it to others breaks nothing."""
    lock = _status(LOCK, descriptor)
    return not os.listdir(descriptor) or (lock is not None and not _why_not_private(lock))


def _why_not_private(status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return "it is a symbolic link"
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    if status.st_uid != os.geteuid():
        return f"it belongs to {user_name(status.st_uid)}"
    return "it is a hard link to another file" if status.st_nlink > 1 else ""


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
            status = _status(name, descriptor)
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


def _status(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
