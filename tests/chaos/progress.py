"""Prints the progress of a run: a line that is rewritten on a terminal, or else a line every ten seconds."""

import asyncio
import sys
import time
from collections.abc import Callable

_TERMINAL_INTERVAL = 0.5
_INTERVAL = 10.0
"""Seconds."""


async def print_progress(line: Callable[[], str]) -> None:
    """Prints the line at an interval, until it is cancelled."""
    begun = time.monotonic()
    is_terminal = sys.stdout.isatty()
    try:
        while True:
            minutes, seconds = divmod(int(time.monotonic() - begun), 60)
            text = f"{minutes:02}:{seconds:02}  {line()}"
            sys.stdout.write(f"\r\x1b[K{text[:180]}" if is_terminal else f"{text}\n")
            sys.stdout.flush()
            await asyncio.sleep(_TERMINAL_INTERVAL if is_terminal else _INTERVAL)
    finally:
        if is_terminal:
            sys.stdout.write("\n")
