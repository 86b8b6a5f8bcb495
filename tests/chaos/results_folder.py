"""Prepares the folder for results. Never deletes a folder that no chaos run created."""

import shutil
from pathlib import Path

_MARKER = "chaos-run"


class ForeignFolderError(Exception):
    """The folder is not empty, and no chaos run created it."""


def prepare_folder(folder: Path) -> Path:
    """Creates the folder, or empties that of an earlier run, and returns its full path.

    Raises:
        ForeignFolderError: it is not empty, and no chaos run created it.
    """
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARKER).exists():
            raise ForeignFolderError(f"{folder} is not empty, and no chaos run created it: choose another --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()
    (folder / "logs").mkdir()
    (folder / "bombs").mkdir()
    return folder
