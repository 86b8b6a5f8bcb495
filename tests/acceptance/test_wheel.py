"""The wheel is all that a deployment needs."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_an_installed_wheel_works_from_any_folder(
    wheel: Path, tmp_path: Path, create_database: Callable[[str | None], str]
) -> None:
    """What the wheel holds migrates a database and starts a process, without the checkout beside it."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # -P keeps the current folder out of the path, PYTHONPATH puts the unpacked wheel before the editable checkout.
    # Without the variables of coverage, which would count all that is unpacked here as code that no test runs.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    environment = {**inherited, "PYTHONPATH": str(site), "DATABASE_URL": create_database(None)}

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
        [
            sys.executable,
            "-P",
            "-c",
            "import outbox_service, outbox_relay, outbox_worker, outbox.queries as q; print(q.sql_folder())",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()) == site / "outbox" / "sql"


def test_the_documented_example_has_no_type_error(wheel: Path, tmp_path: Path) -> None:
    """As strictly as mypy can, against the types that the installed wheel brings."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    example = tmp_path / "example" / "greetings"
    example.mkdir(parents=True)
    (example / "__init__.py").touch()
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"```python\n# greetings/(\w+\.py)\n(.*?)```", page, re.DOTALL)
    assert len(files) == 3
    for name, text in files:
        (example / name).write_text(text, encoding="utf-8")
    options = ["--strict", "--config-file=", "--cache-dir", str(tmp_path / "cache")]
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--python-executable", str(tmp_path / "venv/bin/python"), "greetings"],
        cwd=example.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert found.stdout == "Success: no issues found in 4 source files\n", found.stdout + found.stderr


def test_the_wheel_takes_no_name_of_an_application(wheel: Path) -> None:
    """An application may have a `worker` of its own, as a package or as a folder beside it."""
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    own = {name for name in names if not name.endswith(".dist-info")}
    assert own == {"outbox", "outbox_service", "outbox_relay", "outbox_worker"}
