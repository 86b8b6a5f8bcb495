"""The thread that writes log lines: only this thread blocks if the output is not read."""

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
"""Upper bound of lines that wait to be written; beyond it, the oldest are dropped."""
DRAINING_TIME = 2.0
"""Seconds that an exiting process waits for its last lines to be written."""


class LogWriter(io.TextIOBase):
    """Buffers lines that one thread writes in batches. Logging never blocks unless the thread cannot be started."""

    def __init__(self, stream: TextIO) -> None:
        """Takes the stream, and writes to its descriptor if it has one.

        That bypasses the stream's buffer, which the interpreter flushes at exit: it would block if no one reads.
        """
        self._stream = stream
        self._descriptor = _descriptor(stream)
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._arrived = Event()
        self._is_writing = False
        self._is_stuck = False
        """Whether `wait_until_written` timed out, and nothing was written since."""
        self.lost = 0
        """Lines that were dropped because too many were waiting."""
        self._starting = Lock()
        self._thread: Thread | None = None
        atexit.register(self.wait_until_written)
        os.register_at_fork(after_in_child=self._reset_after_fork)

    def write(self, text: str) -> int:
        """Queues one or more lines."""
        if len(self._lines) == MAX_LINES:
            self.lost += 1
        self._lines.append(text)
        if not self._arrived.is_set():
            self._arrived.set()
        if self._thread is None:
            self._start()
        return len(text)

    def flush(self) -> None:
        """Does nothing: logging must not wait for the output; see `wait_until_written`."""

    def wait_until_written(self, seconds: float = DRAINING_TIME) -> None:
        """Waits up to `seconds` until all lines are written; not if nothing was written since a wait timed out."""
        limit = time.monotonic() + seconds
        while (self._lines or self._is_writing) and not self._is_stuck:
            if time.monotonic() > limit:
                self._is_stuck = True
            time.sleep(0.001)

    def _reset_after_fork(self) -> None:
        """Drops the parent's lines, which the parent writes, and replaces its thread and locks."""
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
            with suppress(Exception):  # out of memory, for example: the next lines may succeed
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
            with suppress(OSError, ValueError):  # lines that cannot be written are lost
                self._output("".join(lines))
        finally:
            self._is_writing = self._is_stuck = False

    def _output(self, text: str) -> None:
        if self._descriptor is None:
            self._stream.write(text)
            return
        # An unencodable character must not fail the whole batch.
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
