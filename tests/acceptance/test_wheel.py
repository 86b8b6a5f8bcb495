"""The wheel is all that a deployment needs."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_an_installed_wheel_works_from_any_folder(tmp_path: Path, create_database: Callable[[str | None], str]) -> None:
    """What the wheel holds migrates a database and starts a process, without the checkout beside it."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # -P keeps the current folder out of the path, PYTHONPATH puts the unpacked wheel before the editable checkout.
    environment = {**os.environ, "PYTHONPATH": str(site), "DATABASE_URL": create_database(None)}

    migrated = subprocess.run(
        [sys.executable, "-P", "-m", "outbox", "migrate"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert migrated.returncode == 0, migrated.stderr
    assert "0001_users_and_outbox" in migrated.stdout

    where = subprocess.run(
        [sys.executable, "-P", "-c", "import service, relay, worker, outbox.queries as q; print(q.sql_folder())"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()) == site / "outbox" / "sql"
