"""Fixtures of the acceptance tests."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import short_folder
from tests.support.up import processes_in


@pytest.fixture
def up_folder() -> Iterator[Path]:
    """A folder for `outbox up`. Kills the processes that a failed test left running in it."""
    with short_folder() as folder:
        yield folder.resolve()
        for process in processes_in(folder.resolve()):
            with suppress(psutil.Error):
                process.kill()
