"""Merges the logs of several processes into one readable stream."""

import io
import json
import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import IO, TextIO, cast

from rich.console import Console
from rich.text import Text

from outbox.runtime.printable import printable

_NAME_WIDTH = 8
_TAB = "\t"
_NAME_STYLES = {"service": "cyan", "relay": "magenta", "worker": "green"}
_LEVEL_STYLES = {"debug": "dim", "warning": "yellow", "error": "bold red", "critical": "bold red"}
_OWN_FIELDS = frozenset({"event", "level", "timestamp", "process", "exception"})


class Stream:
    """Writes lines from any thread to one output, each in one piece."""

    def __init__(self, output: TextIO, *, as_json: bool, on_broken: Callable[[], None]) -> None:
        """Creates a stream.

        Args:
            output: receives the lines, in colour if it is a terminal.
            as_json: writes events unchanged and other lines as events, for a program to read.
            on_broken: called when `output` cannot be written to: its reader or terminal has gone.
        """
        self._output = output
        self._as_json = as_json
        self._on_broken = on_broken
        self._console = Console(file=output, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._lock = threading.Lock()
        self._plain_lines: dict[str, deque[str]] = {}

    def write_line(self, process: str, text: str) -> None:
        """Writes one line that `process` printed, which may be a JSON event."""
        event = _event(text)
        if event is None:
            self._plain_lines.setdefault(process, deque(maxlen=10)).append(text)
            event = {"event": text, "process": process, "timestamp": datetime.now(UTC).isoformat()}
            self._write(json.dumps(event) if self._as_json else _rendered(process, event))
        else:
            self._write(text if self._as_json else _rendered(process, event))

    def follow(self, process: str, output: IO[bytes]) -> None:
        """Writes what a process prints, until it closes its output."""
        with output:
            for line in output:
                self.write_line(process, line.decode(errors="replace").rstrip("\r\n"))

    def writer(self, process: str) -> TextIO:
        """Returns a text file that writes its lines as lines of `process`, to replace this process' standard output."""
        return cast("TextIO", _Writer(lambda text: self.write_line(process, text)))

    def write_paragraph(self, text: str) -> None:
        """Writes a text unchanged."""
        self._write(Text(text))

    def last_output(self, process: str) -> str:
        """Returns the last lines of `process` that were not events, such as a traceback."""
        return "\n".join(self._plain_lines.get(process, ()))

    def _write(self, text: str | Text) -> None:
        with self._lock:
            try:
                if isinstance(text, str):
                    self._output.write(text + "\n")
                else:
                    self._console.print(text)
                self._output.flush()
            except (OSError, ValueError):
                self._on_broken()


class _Writer(io.TextIOBase):
    def __init__(self, write_line: Callable[[str], None]) -> None:
        self._write_line = write_line
        self._part = threading.local()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, rest = (getattr(self._part, "text", "") + text).split("\n")
        self._part.text = rest
        for line in lines:
            self._write_line(line)
        return len(text)


def _event(text: str) -> dict[str, object] | None:
    if not text.startswith("{"):
        return None
    try:
        event = json.loads(text)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _rendered(process: str, event: dict[str, object]) -> Text:
    level_style = _LEVEL_STYLES.get(str(event.get("level", "info")), "")
    line = Text().append(_local_time(event.get("timestamp")), style="dim")
    line.append(f"  {process:<{_NAME_WIDTH}}", style=_NAME_STYLES.get(process, "bold"))
    line.append(
        f"  {printable(str(event['event']), keep=_TAB)}", style=level_style or "bold" if "level" in event else ""
    )
    for name, value in event.items():
        if name not in _OWN_FIELDS:
            line.append(f"  {name}=", style="dim")
            line.append(_value(value), style=level_style)
    for text in str(event.get("exception", "")).splitlines():
        line.append(f"\n{'':10}{process:<{_NAME_WIDTH}}  {printable(text, keep=_TAB)}", style="red")
    return line


def _local_time(timestamp: object) -> str:
    try:
        moment = datetime.fromisoformat(str(timestamp))
    except ValueError:
        moment = datetime.now(UTC)
    return f"{moment.astimezone():%H:%M:%S}"


def _value(value: object) -> str:
    if isinstance(value, str) and value and value.isprintable() and not set(value) & set(' "='):
        return value
    if isinstance(value, str) and "://" in value and value.isprintable() and " " not in value:
        return value  # a link: in quotes a terminal might not open it
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)
