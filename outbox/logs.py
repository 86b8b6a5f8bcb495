"""Logging: one line per event, readable on a terminal and JSON elsewhere, for our own events and libraries' alike."""

import io
import json
import logging
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Lock
from typing import Literal, TextIO, cast

import structlog
from pydantic_core import from_json, to_json
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

Logger = FilteringBoundLogger

_LIBRARIES = {
    **dict.fromkeys(("httpx", "litestar", "mail.log", "rq", "rq_scheduler", "yoyo"), logging.WARNING),
    "uvicorn": logging.ERROR,  # it warns of every stranger who does not speak HTTP
    "psycopg.pool": logging.ERROR,  # it warns at every try of an outage, which we log once
}


class _Output(io.TextIOBase):
    """Where lines go. One that cannot be written is lost, and no work with it.

    Whoever comes while another thread is writing leaves the line to that thread and goes on: a system call per line,
    one thread after the other, took a busy worker more time than all its work.
    """

    def __init__(self, stream: TextIO) -> None:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what cannot be shown would take other lines along
        self._stream = stream
        self._lines: deque[str] = deque(maxlen=10_000)
        self._writing = Lock()

    def write(self, text: str) -> int:
        self._lines.append(text)
        self._write_waiting()
        return len(text)

    def flush(self) -> None:
        with self._writing:
            self._write_lines()
        self._write_waiting()

    def _write_waiting(self) -> None:
        # Not acquire(blocking=False): struck by a time limit before its `try`, it would leave the lock taken for good.
        while self._lines and not self._writing.locked():
            with self._writing:
                self._write_lines()

    def _write_lines(self) -> None:
        lines: list[str] = []
        with suppress(IndexError):
            while True:
                lines.append(self._lines.popleft())
        with suppress(OSError, ValueError):
            self._stream.write("".join(lines))
            self._stream.flush()


class _Lines:
    """What structlog writes to."""

    def __init__(self, output: _Output) -> None:
        self._output = output

    def line(self, text: str) -> None:
        self._output.write(text + "\n")

    debug = info = warning = error = critical = line


class _Counts:
    """Numbers warnings and errors: how many of a kind this process has logged, and all of them when it stops."""

    def __init__(self) -> None:
        self._logged: Counter[str] = Counter()
        self._lock = Lock()

    def __call__(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        if event["level"] in ("warning", "error", "critical"):
            with self._lock:
                self._logged[event["event"]] += 1
                event["nth"] = self._logged[event["event"]]
        elif event["event"] == "stopped":
            with self._lock:
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
        _add_bound,
        structlog.contextvars.merge_contextvars,  # what handlers from elsewhere bind
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
        final = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_to_json)]

    output = _Output(sys.stdout)
    structlog.configure(
        processors=[*counted, *final],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _Lines(output),
        cache_logger_on_first_use=True,
    )

    _configured[:] = [structlog.get_logger()]

    handler = logging.StreamHandler(cast("TextIO", output))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=counted,
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


_configured: list[Logger] = []
"""One for all, once it is known where lines go: to make one takes as long as to write a line."""


@contextmanager
def bound(**fields: object) -> Iterator[None]:
    """Adds fields to every line that this thread or task logs inside the block, whoever logs it."""
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


def _add_bound(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for name, value in _bound.get().items():
        event.setdefault(name, value)
    return event


# One variable for all fields: structlog's own, one for each, take longer than all else that an attempt costs.
_bound: ContextVar[Mapping[str, object]] = ContextVar("_bound", default={})  # noqa: B039 - nobody writes into it


PAYLOAD_LIMIT = 2000
"""Characters of a payload that a log line shows."""


def stored(payload: str) -> object:
    """Returns a row's payload as a log line shows it: what the JSON says, or its text where Python cannot read that.

    Of one that is over `PAYLOAD_LIMIT`, or was cut there, it is the beginning of the text.
    """
    if len(payload) > PAYLOAD_LIMIT:
        return payload[:PAYLOAD_LIMIT]
    try:
        return from_json(payload)
    except ValueError:  # cut, or nested too deep for Python
        return payload


def reset() -> None:
    """Undoes `configure`, for tests that go on in the same process."""
    structlog.reset_defaults()
    _configured.clear()


def _to_json(event: EventDict, **_: object) -> str:
    with suppress(ValueError):  # lone surrogates
        text = to_json(event, fallback=str, inf_nan_mode="strings")
        if text.isascii():
            return text.decode()
        event = json.loads(text)
    return json.dumps(event, default=str, separators=(",", ":"))  # escapes whatever else a terminal might obey


def get() -> Logger:
    """Returns the logger, whose methods take an event and its fields."""
    logger: Logger = _configured[0] if _configured else structlog.get_logger()
    return logger
