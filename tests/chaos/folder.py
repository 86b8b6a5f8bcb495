"""The folder for results: emptied before a run, and never one that is somebody else's."""

import shutil
from pathlib import Path

_MARK = "chaos-run"


class ForeignFolderError(Exception):
    """The folder holds something that no chaos run has put there."""


def emptied(folder: Path) -> Path:
    """Makes the folder, or empties the one of an earlier run, and returns its full path.

    Raises:
        ForeignFolderError: there is something else in it.
    """
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise ForeignFolderError(f"{folder} is not empty, and no chaos run has made it: choose another --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()
    (folder / "logs").mkdir()
    (folder / "bombs").mkdir()
    return folder
