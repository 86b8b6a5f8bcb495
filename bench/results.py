"""What a run leaves behind: all samples, and on what machine and settings they were measured."""

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import redis

from bench.measure import Figure
from bench.stage import Bench

_PACKAGES = (
    *("outbox-service", "psycopg", "redis", "hiredis", "rq", "rq-scheduler", "litestar", "uvicorn", "uvloop"),
    *("procrastinate", "pgqueuer", "asyncpg"),
)
_POSTGRES_SETTINGS = (
    *("fsync", "synchronous_commit", "full_page_writes", "wal_level", "shared_buffers", "max_wal_size", "autovacuum"),
    *("max_connections", "jit"),
)
_REDIS_SETTINGS = ("save", "appendonly", "maxmemory", "maxmemory-policy", "io-threads")


def results(bench: Bench, figures: Sequence[Figure], load: float | None) -> dict[str, Any]:
    """Returns all of it, ready for JSON.

    Args:
        bench: the stage; its servers still run.
        figures: what was measured.
        load: what `load_average` returned before that.
    """
    return {
        "machine": {**_machine(), "load average before": load, "load average after": load_average()},
        "versions": {
            "python": platform.python_version(),
            **_servers(bench),
            **{name: version for name in _PACKAGES if (version := _version(name))},
        },
        "postgres settings": _postgres_settings(bench),
        "postgres commit in ms": _commit_time(bench),
        "redis settings": _redis_settings(bench),
        "runs": bench.runs,
        "smoke": bench.smoke,
        "figures": [
            {
                **asdict(figure),
                "medians": {name: median(values) for name, values in figure.samples.items()},
                "times better than": {name: figure.ratio(name) for name in figure.samples if name != figure.ours},
            }
            for figure in figures
        ],
    }


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory in GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
    }


def load_average() -> float | None:
    """Returns how many processes wanted to run in the last minute; None where the system does not tell."""
    with suppress(OSError, AttributeError):
        return round(os.getloadavg()[0], 2)
    return None


def _cpu() -> str:
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if match := re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def _servers(bench: Bench) -> dict[str, str]:
    with bench.server() as connection, bench.client() as client:
        shown = connection.execute("SHOW server_version").fetchone()
        assert shown is not None
        info: dict[str, Any] = dict(client.info("server"))
        if "valkey_version" in info:
            return {"postgres": str(shown[0]), "valkey": str(info["valkey_version"])}
        return {"postgres": str(shown[0]), "redis server": str(info["redis_version"])}


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _postgres_settings(bench: Bench) -> dict[str, str]:
    statement = "SELECT name, current_setting(name) FROM pg_settings WHERE name = ANY (%s) ORDER BY name"
    with bench.server() as connection:
        return {str(name): str(value) for name, value in connection.execute(statement, [list(_POSTGRES_SETTINGS)])}


def _commit_time(bench: Bench) -> float:
    """Returns how long the smallest durable commit takes, in the median: what `fsync` means on this machine."""
    seconds = []
    with bench.server() as connection:
        for _ in range(200):
            begun = time.perf_counter()
            connection.execute("SELECT pg_logical_emit_message(true, 'bench', '')")
            seconds.append(time.perf_counter() - begun)
    return round(median(seconds) * 1000, 3)


def _redis_settings(bench: Bench) -> dict[str, str]:
    found: dict[str, str] = {}
    with bench.client() as client, suppress(redis.RedisError):  # a hosted one may not tell
        for name in _REDIS_SETTINGS:
            found |= {str(key): str(value) for key, value in client.config_get(name).items()}
    return found
