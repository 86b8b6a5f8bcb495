"""Logging: one line per event, readable on a terminal and JSON elsewhere, for our own events and libraries' alike."""

import io
import logging
import sys
from collections import Counter
from contextlib import suppress
from threading import Lock
from typing import Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

Logger = FilteringBoundLogger

_LIBRARIES = {
    **dict.fromkeys(("httpx", "litestar", "mail.log", "rq", "rq_scheduler", "uvicorn", "yoyo"), logging.WARNING),
    "psycopg.pool": logging.ERROR,  # it warns at every try of an outage, which we log once
}


class _Output(io.TextIOBase):
    """Where lines go. One that cannot be written is lost, and no work with it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


class _Counts:
    """Numbers warnings and errors: how many of a kind this process has logged, and all of them when it stops."""

    def __init__(self) -> None:
        self._logged: Counter[str] = Counter()
        self._lock = Lock()

    def __call__(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        with self._lock:
            if event["level"] in ("warning", "error", "critical"):
                self._logged[event["event"]] += 1
                event["nth"] = self._logged[event["event"]]
            elif event["event"] == "stopped":
                event["warnings"] = dict(self._logged)
        return event


def configure(process: str, level: str, log_format: Literal["console", "json"] | None) -> None:
    """Sets up logging for one process, to standard output.

    Args:
        process: `service`, `relay`, `worker` or `outbox`; goes along in every line.
        level: the lowest level that is printed.
        log_format: None chooses `console` on a terminal and `json` elsewhere.
    """
    if log_format is None:
        log_format = "console" if sys.stdout.isatty() else "json"

    def add_process(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event["process"] = process
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_process,
    ]
    counted: list[Processor] = [*shared, _Counts()]
    if log_format == "console":
        # Plain tracebacks: the pretty ones print local variables, and a password may be among them.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stdout.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
        final: list[Processor] = [renderer]
    else:
        final = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]

    output = cast("TextIO", _Output(sys.stdout))
    structlog.configure(
        processors=[*counted, *final],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(output),
        cache_logger_on_first_use=True,
    )

    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name, lowest in _LIBRARIES.items():
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(lowest)


def get() -> Logger:
    """Returns a logger whose methods take an event and its fields."""
    logger: Logger = structlog.get_logger()
    return logger
