"""The wheel is all that a deployment needs."""

import inspect
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

import outbox

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from this checkout."""
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
    """It migrates a database and starts a process without the checkout."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # -P keeps the current folder out of the path, PYTHONPATH puts the unpacked wheel before the editable checkout.
    # Without coverage's variables: it would count the unpacked files as code that no test runs.
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


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment in which the wheel is installed, with the libraries of this one."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


def type_errors(target: str, folder: Path, python: Path) -> str:
    """Returns what strict mypy says about a package or file, with the types that the installed wheel provides."""
    options = ["--strict", "--config-file=", "--cache-dir", str(folder / "cache"), "--python-executable", str(python)]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *options, target],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    return "" if checked.returncode == 0 else checked.stdout + checked.stderr


def test_the_example_of_the_readme_has_no_type_error(python: Path, tmp_path: Path) -> None:
    """It passes strict mypy."""
    package = tmp_path / "greetings"
    package.mkdir()
    (package / "__init__.py").touch()
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"```python\n# greetings/(\w+\.py)\n(.*?)```", page, re.DOTALL)
    assert len(files) == 3
    for name, text in files:
        (package / name).write_text(text, encoding="utf-8")
    assert not type_errors("greetings", tmp_path, python)


EXAMPLE_HEAD = f"""
from email.message import EmailMessage
from typing import cast

import psycopg
from pydantic import BaseModel

from outbox import {", ".join(outbox.__all__)}

connection = cast("psycopg.Connection", None)
"""


def test_every_public_name_has_an_example_that_works(python: Path, tmp_path: Path) -> None:
    """All examples together pass strict mypy, run, and print what their comments say."""
    names = sorted(outbox.__all__, key=lambda name: (name != "Task", name != "handler"))  # others use what these define
    examples = [inspect.cleandoc(str(getattr(outbox, name).__doc__)).partition("\nExample:\n")[2] for name in names]
    assert [name for name, example in zip(names, examples, strict=True) if not example] == []
    text = EXAMPLE_HEAD + "\n".join(map(dedent, examples)) + "\n"
    (tmp_path / "examples.py").write_text(text, encoding="utf-8")
    assert not type_errors("examples.py", tmp_path, python)
    done = subprocess.run([python, "examples.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == re.findall(r"print\(error\)  # (.*)", text)


def test_the_wheel_installs_only_its_own_packages(wheel: Path) -> None:
    """An application may have its own `worker`, as a package or as a folder."""
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    own = {name for name in names if not name.endswith(".dist-info")}
    assert own == {"outbox", "outbox_service", "outbox_relay", "outbox_worker"}
