"""Reads the logs of the processes."""

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

_EVENTS = frozenset(
    {
        "enqueued task",
        "swept row",
        "rescued row",
        "process task failed",
        "outcomes lost at shutdown",
        "dropped outcome",
        "stopped",
    }
)
"""Events that the judge reads."""


def read(logs: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the lines that the judge reads, by time, and every traceback or "request failed".

    Args:
        logs: the folder with the logs of the processes, named as in `worker-0.3.log`.
    """
    lines: list[dict[str, Any]] = []
    tracebacks: list[str] = []
    for path in sorted(logs.glob("*.log")):
        slot = path.name.partition(".")[0]
        with path.open(encoding="utf-8", errors="replace") as text:
            plain: list[str] = []
            for line in text:
                if not (line.startswith("{") and line.endswith("}\n")):
                    plain.append(line)
                    continue
                fields = json.loads(line)
                if "exception" in fields or fields["event"] == "request failed":
                    tracebacks.append(f"{path.name}: {line.strip()}")
                if fields["event"] in _EVENTS:
                    lines.append({**fields, "slot": slot, "at": _seconds(fields["timestamp"])})
        if any("Traceback" in line for line in plain):
            tracebacks.append(f"{path.name}: {''.join(plain)}")
    return sorted(lines, key=lambda line: float(line["at"])), tracebacks


def lines_of(lines: Iterable[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    """Returns the lines of one event."""
    return [line for line in lines if line["event"] == event]


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()
