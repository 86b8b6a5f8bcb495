"""Opens folders and files that belong to this user, and none that another user may have created or replaced."""

import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from outbox.devstack.trusted_paths import open_path, status_of, user_name
from outbox.errors import StartError

_TO_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
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
            if status := status_of(name, self.descriptor):
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
        return status_of(name, self.descriptor) is not None

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
    lock = status_of(LOCK, descriptor)
    return not os.listdir(descriptor) or (lock is not None and not _why_not_private(lock))


def _why_not_private(status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return "it is a symbolic link"
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    if status.st_uid != os.geteuid():
        return f"it belongs to {user_name(status.st_uid)}"
    return "it is a hard link to another file" if status.st_nlink > 1 else ""
