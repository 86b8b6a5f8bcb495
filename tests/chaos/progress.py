"""Saying how the run goes: one line that is rewritten on a terminal, elsewhere one every ten seconds."""

import asyncio
import sys
import time
from collections.abc import Callable

_ON_TERMINAL = 0.5
_ELSEWHERE = 10.0


async def tell(line: Callable[[], str]) -> None:
    """Prints the line again and again, until it is cancelled."""
    begun = time.monotonic()
    is_terminal = sys.stdout.isatty()
    try:
        while True:
            minutes, seconds = divmod(int(time.monotonic() - begun), 60)
            text = f"{minutes:02}:{seconds:02}  {line()}"
            sys.stdout.write(f"\r\x1b[K{text[:180]}" if is_terminal else f"{text}\n")
            sys.stdout.flush()
            await asyncio.sleep(_ON_TERMINAL if is_terminal else _ELSEWHERE)
    finally:
        if is_terminal:
            sys.stdout.write("\n")
