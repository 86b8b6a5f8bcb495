"""Runs the process that THREADLESS names; after SIGUSR1, the process can start no thread.

This is the effect of a limit of processes (`pids.max`), which counts threads, and which a test may not be able to set.
"""

import _thread
import os
import signal
import threading
from typing import Any


def refuse(*_: Any, **__: Any) -> None:
    """Fails as Python does if the system has no thread."""
    raise RuntimeError("can't start new thread")


def refuse_threads(*_: Any) -> None:
    """Makes every start of a thread fail from now on."""
    for module, name in (
        (threading, "_start_new_thread"),
        (threading, "_start_joinable_thread"),
        (_thread, "start_new_thread"),
    ):
        if hasattr(module, name):
            setattr(module, name, refuse)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, refuse_threads)

    from outbox.runtime.process import run_process

    run_process(os.environ["THREADLESS"])
