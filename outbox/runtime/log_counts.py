"""Counts warnings and errors by kind, and limits the lines of events that any client of Redis can cause."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from threading import Lock

import structlog
from structlog.typing import EventDict, WrappedLogger

FLOODING = frozenset({"deleted key", "dropped job", "ignored an RQ command"})
"""Events that any client of Redis can cause in any number, one for a few bytes."""
MAX_FLOOD_LINES = 100
"""Upper bound of lines per event of `FLOODING` and `FLOOD_TIME`."""
FLOOD_TIME = 60.0
"""Seconds in which `MAX_FLOOD_LINES` are counted."""


class Counts:
    """Numbers the warnings and errors of a process by kind, and adds the totals to its last line.

    Args:
        lost_lines: returns the number of lines dropped because the output was not read.
    """

    def __init__(self, lost_lines: Callable[[], int]) -> None:
        self._lost_lines = lost_lines
        self._logged: Counter[str] = Counter()
        self._floods: dict[str, tuple[float, int]] = {}
        """By event: when the current `FLOOD_TIME` began, and the count of the event before it."""
        self._lock = Lock()

    def __call__(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        """Counts one event; a structlog processor.

        Raises:
            structlog.DropEvent: the event has reached `MAX_FLOOD_LINES`.
        """
        if event["level"] in ("warning", "error", "critical"):
            # A library's line is counted by its format string: the text may name an object and never repeat.
            record: logging.LogRecord | None = event.get("_record")
            kind = event["event"] if record is None else str(record.msg)
            with self._lock:
                self._logged[kind] += 1
                event["nth"] = self._logged[kind]
                if record is None and kind in FLOODING and self._is_flood(kind):
                    raise structlog.DropEvent
        elif event["event"] == "stopped":
            with self._lock:
                event["warnings"] = dict(self._logged)
            if lost := self._lost_lines():
                event["lost_lines"] = lost
        return event

    def _is_flood(self, event: str) -> bool:
        now, count = time.monotonic(), self._logged[event]
        began, before = self._floods.get(event, (-math.inf, 0))
        if now - began >= FLOOD_TIME:
            began, before = self._floods[event] = now, count - 1
        return count - before > MAX_FLOOD_LINES
