"""Runs the processes under test, restarts them as a supervisor would, and records every exit."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from tests.chaos.evidence import SHORTAGES, Exit
from tests.support.processes import command_of

ROOT = Path(__file__).resolve().parents[2]
"""The checkout that contains these tests."""

_POLL = 0.05
_RESTART_DELAY = 1.0
"""Seconds until a process is restarted that was not asked to end."""
_TAIL = 3000
"""Bytes of a log."""


class Slot:
    """Keeps one process running."""

    def __init__(self, module: str, number: int, environment: Mapping[str, str], folder: Path) -> None:
        self.module = module
        self.number = number
        self.name = f"{module}-{number}"
        self.process: subprocess.Popen[bytes] | None = None
        self.cause = ""
        """The signal that was sent to end it."""
        self.shortage = ""
        """The kind of fault, one of `SHORTAGES`, that may end it."""
        self.shortage_until = 0.0
        """Until when it may, by the monotonic clock."""
        self.restart_delay = _RESTART_DELAY
        """Seconds until it is restarted."""
        self.ready = asyncio.Event()
        self.logs: list[Path] = []
        self._environment = environment
        self._folder = folder

    @property
    def pid(self) -> int:
        """The id of the current or last process."""
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Starts the process."""
        self.cause, self.shortage, self.restart_delay = "", "", _RESTART_DELAY
        self.ready.clear()
        log = self._folder / f"{self.name}.{len(self.logs)}.log"
        self.logs.append(log)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command_of(self.module),
                cwd=ROOT,
                env={**clean_environment(), **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self, number: signal.Signals, restart_delay: float) -> None:
        """Sends a signal that ends the process, and sets the delay of the restart in seconds."""
        if self.process is not None and self.process.poll() is None:
            self.cause, self.restart_delay = number.name, restart_delay
            self.ready.clear()
            self.process.send_signal(number)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal that does not end the process: SIGSTOP or SIGCONT."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def check_ready(self) -> None:
        """Sets `ready` if the process has logged that it started."""
        if not self.ready.is_set() and not self.cause and b'"event":"started"' in self.logs[-1].read_bytes():
            self.ready.set()

    def tail(self) -> str:
        """Returns the end of its log."""
        return self.logs[-1].read_bytes()[-_TAIL:].decode(errors="replace")


class Processes:
    """Supervises all slots."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self.slots = list(slots)
        self.exits: list[Exit] = []
        self._closing = False

    def of(self, module: str) -> list[Slot]:
        """Returns the slots of one module."""
        return [slot for slot in self.slots if slot.module == module]

    def last_code(self, slot: Slot) -> int | None:
        """Returns the exit code of the last process of a slot."""
        return next((end.code for end in reversed(self.exits) if end.slot == slot.name), None)

    async def watch(self) -> None:
        """Restarts processes that have ended, until it is cancelled."""
        due: dict[Slot, float] = {}
        while True:
            await asyncio.sleep(_POLL)
            for slot in self.slots:
                assert slot.process is not None
                if slot in due:
                    if time.monotonic() >= due[slot]:
                        del due[slot]
                        slot.start()
                elif slot.process.poll() is not None:
                    self._record(slot)
                    due[slot] = time.monotonic() + slot.restart_delay
                else:
                    slot.check_ready()

    async def close(self, limit: float = 40.0) -> None:
        """Ends all processes by SIGTERM, and by SIGKILL after the limit, which is recorded as an unexpected exit."""
        for slot in self.slots:
            slot.send(signal.SIGCONT)
            slot.end(signal.SIGTERM, 0)
        deadline = time.monotonic() + limit
        alive = [slot for slot in self.slots if slot.process is not None]
        while alive:
            for slot in [slot for slot in alive if slot.process is None or slot.process.poll() is not None]:
                self._record(slot)
                alive.remove(slot)
            if time.monotonic() > deadline:
                self.kill()
            await asyncio.sleep(_POLL)

    def kill(self) -> None:
        """Kills all processes that still run."""
        for slot in self.slots:
            if slot.process is not None and slot.process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(slot.process.pid, signal.SIGKILL)

    def _record(self, slot: Slot) -> None:
        assert slot.process is not None
        code = slot.process.returncode
        is_short = time.monotonic() < slot.shortage_until
        cause = slot.shortage if slot.shortage and is_short and code > 0 else slot.cause
        is_expected = (cause, code) in (("SIGKILL", -signal.SIGKILL), ("SIGTERM", 0)) or cause in SHORTAGES
        tail = "" if is_expected else slot.tail()
        self.exits.append(Exit(slot.name, slot.module, time.time(), code, cause, tail, slot.logs[-1].name))


def clean_environment() -> dict[str, str]:
    """Returns this environment without the settings of the processes."""
    ours = ("OUTBOX_", "DATABASE_URL", "REDIS_URL", "SMTP_", "MAIL_", "HTTP_SERVER", "PUBLIC_URL", "VERIFY_", "LOG_")
    return {name: value for name, value in os.environ.items() if not name.startswith((*ours, "SECRET_KEY", "TEST_"))}
