"""Collects the results of a run: all samples, and the machine, versions and settings that produced them."""

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

from bench.figure import Figure
from bench.testbed import Bench

_PACKAGES = (
    *("outbox-service", "psycopg", "redis", "hiredis", "rq", "rq-scheduler", "litestar", "uvicorn", "uvloop"),
    *("procrastinate", "pgqueuer", "asyncpg"),
)
_POSTGRES_SETTINGS = (
    *("fsync", "synchronous_commit", "full_page_writes", "wal_level", "shared_buffers", "max_wal_size", "autovacuum"),
    *("max_connections", "jit"),
)
_REDIS_SETTINGS = ("save", "appendonly", "maxmemory", "maxmemory-policy", "io-threads")


def collect_results(bench: Bench, figures: Sequence[Figure], load_before: float | None) -> dict[str, Any]:
    """Returns the results of a run, in JSON types.

    Args:
        bench: the bench; its servers are running.
        figures: the figures of all parts.
        load_before: the `load_average` before the run.
    """
    return {
        "machine": {**_machine(), "load average before": load_before, "load average after": load_average()},
        "versions": {
            "python": platform.python_version(),
            **_server_versions(bench),
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
    """Returns the load average of the last minute, or None if the system does not report one."""
    with suppress(OSError, AttributeError):
        return round(os.getloadavg()[0], 2)
    return None


def _cpu() -> str:
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if match := re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def _server_versions(bench: Bench) -> dict[str, str]:
    with bench.connect_to_server() as connection, bench.redis_client() as client:
        row = connection.execute("SHOW server_version").fetchone()
        assert row is not None
        info: dict[str, Any] = dict(client.info("server"))
        if "valkey_version" in info:
            return {"postgres": str(row[0]), "valkey": str(info["valkey_version"])}
        return {"postgres": str(row[0]), "redis server": str(info["redis_version"])}


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _postgres_settings(bench: Bench) -> dict[str, str]:
    statement = "SELECT name, current_setting(name) FROM pg_settings WHERE name = ANY (%s) ORDER BY name"
    with bench.connect_to_server() as connection:
        return {str(name): str(value) for name, value in connection.execute(statement, [list(_POSTGRES_SETTINGS)])}


def _commit_time(bench: Bench) -> float:
    """Returns the median time of the smallest durable commit, in ms. It shows what an fsync costs on this machine."""
    seconds = []
    with bench.connect_to_server() as connection:
        for _ in range(200):
            begun = time.perf_counter()
            connection.execute("SELECT pg_logical_emit_message(true, 'bench', '')")
            seconds.append(time.perf_counter() - begun)
    return round(median(seconds) * 1000, 3)


def _redis_settings(bench: Bench) -> dict[str, str]:
    settings: dict[str, str] = {}
    with bench.redis_client() as client, suppress(redis.RedisError):  # a hosted server may forbid CONFIG
        for name in _REDIS_SETTINGS:
            settings |= {str(key): str(value) for key, value in client.config_get(name).items()}
    return settings
