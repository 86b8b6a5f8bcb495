"""The thread that writes log lines: it alone blocks where the output is not read."""

import atexit
import io
import os
import select
import time
from collections import deque
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import TextIO

MAX_LINES = 10_000
"""Lines that wait to be written; of more, the oldest are dropped."""
DRAINING_TIME = 2.0
"""Seconds that a process waits at its end for its last lines to be written."""


class LogWriter(io.TextIOBase):
    """Buffers lines, which one thread writes in batches. Logging never blocks, unless no thread can be started."""

    def __init__(self, stream: TextIO) -> None:
        """Takes the stream: its descriptor, where it has one.

        Past its buffer: the interpreter flushes that as it ends, and would wait for a write that nobody reads.
        """
        self._stream = stream
        self._descriptor = _descriptor(stream)
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._arrived = Event()
        self._is_writing = False
        self._is_stuck = False
        """Whether a drain has timed out, and nothing was written since."""
        self.lost = 0
        """Lines that were dropped because too many were waiting."""
        self._starting = Lock()
        self._thread: Thread | None = None
        atexit.register(self.drain)
        os.register_at_fork(after_in_child=self._begin_anew)

    def write(self, text: str) -> int:
        """Takes a line, or several."""
        if len(self._lines) == MAX_LINES:
            self.lost += 1
        self._lines.append(text)
        if not self._arrived.is_set():
            self._arrived.set()
        if self._thread is None:
            self._start()
        return len(text)

    def flush(self) -> None:
        """Does nothing: to wait for each line is what this is there to avoid; see `drain`."""

    def drain(self, seconds: float = DRAINING_TIME) -> None:
        """Waits up to `seconds` until all lines are written; not if the last wait was in vain and none was since."""
        limit = time.monotonic() + seconds
        while (self._lines or self._is_writing) and not self._is_stuck:
            if time.monotonic() > limit:
                self._is_stuck = True
            time.sleep(0.001)

    def _begin_anew(self) -> None:
        """Leaves the lines of the process that was forked to that process, and its thread and locks as well."""
        self._lines.clear()
        self._arrived = Event()
        self._is_writing = self._is_stuck = False
        self._starting = Lock()
        self._thread = None

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                thread = Thread(target=self._run, name="log", daemon=True)
                try:
                    thread.start()
                except (RuntimeError, MemoryError):  # no thread can be started
                    self._write_lines()
                else:
                    self._thread = thread

    def _run(self) -> None:
        while True:
            with suppress(Exception):  # such as a shortage of memory: goes on with the next lines
                self._arrived.wait()
                self._arrived.clear()
                self._write_lines()

    def _write_lines(self) -> None:
        self._is_writing = True
        try:
            lines: list[str] = []
            with suppress(IndexError):
                while True:
                    lines.append(self._lines.popleft())
            with suppress(OSError, ValueError):  # a line that cannot be written is lost, and no work with it
                self._pass_on("".join(lines))
        finally:
            self._is_writing = self._is_stuck = False

    def _pass_on(self, text: str) -> None:
        if self._descriptor is None:
            self._stream.write(text)
            return
        # An unencodable character would fail the whole batch.
        left = text.encode(self._stream.encoding or "utf-8", errors="backslashreplace")
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [], 1.0)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None
