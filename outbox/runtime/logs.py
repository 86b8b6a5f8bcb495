"""Writes one log line per event of ours or of a library: text on a terminal, JSON elsewhere."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Literal

import structlog
from pydantic_core import from_json, to_json
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from outbox.runtime.log_counts import Counts
from outbox.runtime.log_limits import FIELD_LIMIT, LINE_LIMIT, LONGEST_LINE, cut_fields
from outbox.runtime.log_writer import LogWriter
from outbox.runtime.printable import printable
from outbox.runtime.redaction import hide_rows, masked

Logger = FilteringBoundLogger

_LIBRARIES = {
    **dict.fromkeys(("httpx", "litestar", "mail.log", "rq", "rq_scheduler"), logging.WARNING),
    "uvicorn": logging.ERROR,  # it warns about every client that does not speak HTTP
    "psycopg": logging.ERROR,  # it warns about each connection and try of an outage, which we log once
}


class _Lines:
    """The logger that structlog writes to."""

    def __init__(self, output: LogWriter) -> None:
        self._output = output

    def line(self, text: str) -> None:
        self._output.write(text + "\n")

    debug = info = warning = error = critical = line


class _Handler(logging.Handler):
    """Writes the lines of libraries, which use `logging`."""

    def __init__(self, output: LogWriter) -> None:
        super().__init__()
        self._output = output
        self.addFilter(lambda record: record.name != _FAILURES.name)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._output.write(self.format(record) + "\n")
        except Exception:  # noqa: BLE001 - a log call must not fail the library's work
            self.handleError(record)

    def flush(self) -> None:  # called by logging.shutdown() alone
        self._output.wait_until_written()


def configure(process: str, level: str, log_format: Literal["console", "json"] | None) -> None:
    """Sets up logging for one process, to standard output.

    Args:
        process: `service`, `relay`, `worker` or `outbox`; a field of every line.
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
        structlog.contextvars.merge_contextvars,  # for handlers that use structlog's own binding
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_process,
    ]
    counted: list[Processor] = [*shared, Counts(lambda: sum(writer.lost for writer in _writers))]
    renderer: Processor
    if log_format == "console":
        renderer = _escaping(
            structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty(), exception_formatter=structlog.dev.plain_traceback)
        )
    else:
        renderer = structlog.processors.JSONRenderer(_to_json)
    final: list[Processor] = [structlog.processors.format_exc_info, _shorten_traceback, _never_failing(renderer)]

    flush()
    output = LogWriter(sys.stdout)
    structlog.configure(
        processors=[*counted, hide_rows, _forward_to_trackers, *final],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _Lines(output),
        cache_logger_on_first_use=True,
    )

    _loggers[:] = [structlog.get_logger()]
    _writers[:] = [output]

    handler = _Handler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=counted,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, hide_rows, *final],
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


_FAILURES = logging.getLogger("outbox")
"""Gets each event with an exception as a record of the standard library, so that error trackers see it. The record is
not printed, because the event's line is."""


def _forward_to_trackers(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    error = event.get("exc_info")
    if isinstance(error, BaseException):
        fields = {name: value for name, value in event.items() if name not in ("event", "exc_info")}
        with suppress(Exception):
            _FAILURES.log(
                logging.getLevelNamesMapping()[event["level"].upper()],
                event["event"],
                exc_info=(type(error), error, error.__traceback__),
                extra={"fields": fields},
            )
    return event


TRACEBACK_LIMIT = 10_000
"""Characters of a traceback that a log line shows, counted from its end."""


def _shorten_traceback(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    if isinstance(text := event.get("exception"), str):
        event["exception"] = masked(text)[-TRACEBACK_LIMIT:]
    return event


def _escaping(render: Processor) -> Processor:
    """Returns a renderer that escapes control characters: paths, ids and task names may come from others."""

    def rendered(logger: WrappedLogger, method: str, event: EventDict) -> Any:
        escaped: EventDict = {}
        for name, value in event.items():
            if isinstance(value, str):
                escaped[name] = printable(value, "\n\t" if name == "exception" else "")
            elif isinstance(value, bool | int | float | None):
                escaped[name] = value
            else:
                escaped[name] = printable(repr(value))
        return render(logger, method, escaped)

    return rendered


def _never_failing(render: Processor) -> Processor:
    """Returns a renderer that never raises, and whose lines have a limit.

    If a field cannot be rendered, or there are too many fields, it renders only the known ones. It checks the rendered
    line, because nearly all lines are short and checking each field first would take longer.
    """

    def rendered(logger: WrappedLogger, method: str, event: EventDict) -> Any:
        try:
            line = render(logger, method, event)
            if len(line) <= LINE_LIMIT:
                return line
            line = render(logger, method, cut_fields(event))
            if len(line) <= LONGEST_LINE:
                return line
            why = "too long"
        except Exception as error:  # noqa: BLE001 - a field's __str__ may raise anything
            why = type(error).__name__
        known = ("event", "level", "timestamp", "process", "type", "row", "delivery")
        return render(logger, method, cut_fields({**{name: event.get(name) for name in known}, "fields_error": why}))

    return rendered


_loggers: list[Logger] = []
"""The one logger, once `configure` was called: making one takes as long as writing a line."""
_writers: list[LogWriter] = []
"""Its writer."""


def bind_fields(**fields: object) -> None:
    """Adds fields to all later lines of this thread or task."""
    _bound.set({**_bound.get(), **fields})


@contextmanager
def bound_fields(**fields: object) -> Iterator[None]:
    """Adds fields to the lines of this thread or task inside the block."""
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


def _add_bound(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for name, value in _bound.get().items():
        event.setdefault(name, value)
    return event


# One variable for all fields: structlog's variable per field takes longer than the rest of an attempt.
_bound: ContextVar[Mapping[str, object]] = ContextVar("_bound", default={})  # noqa: B039 - never changed in place


PAYLOAD_LIMIT = FIELD_LIMIT
"""Characters that a log line shows of a payload."""


def payload_field(payload: str) -> object:
    """Returns a stored payload as a field of a log line: its parsed JSON, or its text if Python cannot parse it.

    A payload longer than `PAYLOAD_LIMIT`, or cut there, is shown as the beginning of its text.
    """
    if len(payload) > PAYLOAD_LIMIT:
        return payload[:PAYLOAD_LIMIT]
    try:
        return from_json(payload)
    except ValueError:  # cut, or nested too deeply for Python
        return payload


def flush() -> None:
    """Waits up to `DRAINING_TIME` until the lines logged so far are written."""
    for writer in _writers:
        writer.wait_until_written()


def unconfigure() -> None:
    """Undoes `configure`, for tests, which share a process."""
    flush()
    structlog.reset_defaults()
    _loggers.clear()
    _writers.clear()


def _to_json(event: EventDict, **_: object) -> str:
    with suppress(ValueError):  # lone surrogates
        text = to_json(event, fallback=str, inf_nan_mode="strings")
        if text.isascii():
            return text.decode()
        event = json.loads(text)
    return json.dumps(event, default=str, separators=(",", ":"))  # escapes control characters too


def get() -> Logger:
    """Returns the logger, whose methods take an event and its fields."""
    logger: Logger = _loggers[0] if _loggers else structlog.get_logger()
    return logger
