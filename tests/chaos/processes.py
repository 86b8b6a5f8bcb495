"""The processes under test, started again as a supervisor of services would, and every end of theirs on record."""

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
"""The checkout: what runs is what lies beside these tests."""

_LOOK = 0.05
_UNASKED_PAUSE = 1.0
_TAIL = 3000
"""Bytes of a log."""


class Slot:
    """A place in which one process is always to run."""

    def __init__(self, module: str, number: int, environment: Mapping[str, str], folder: Path) -> None:
        self.module = module
        self.number = number
        self.name = f"{module}-{number}"
        self.process: subprocess.Popen[bytes] | None = None
        self.cause = ""
        """The signal that was sent to end it."""
        self.shortage = ""
        """The kind of the fault, one of `SHORTAGES`, by which it may end."""
        self.shortage_until = 0.0
        """Until when it may, by the monotonic clock."""
        self.pause = _UNASKED_PAUSE
        """Seconds until it is started again."""
        self.ready = asyncio.Event()
        self.logs: list[Path] = []
        self._environment = environment
        self._folder = folder

    @property
    def pid(self) -> int:
        """Of the process that runs, or of the last one that did."""
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Starts the process."""
        self.cause, self.shortage, self.pause = "", "", _UNASKED_PAUSE
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

    def end(self, number: signal.Signals, pause: float) -> None:
        """Sends a signal that is to end the process, which is started again after a pause."""
        if self.process is not None and self.process.poll() is None:
            self.cause, self.pause = number.name, pause
            self.ready.clear()
            self.process.send_signal(number)

    def send(self, number: signal.Signals) -> None:
        """Sends SIGSTOP or SIGCONT."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def look(self) -> None:
        """Takes note of it when the process says that it has started."""
        if not self.ready.is_set() and not self.cause and b'"event":"started"' in self.logs[-1].read_bytes():
            self.ready.set()

    def tail(self) -> str:
        """Returns the end of its log."""
        return self.logs[-1].read_bytes()[-_TAIL:].decode(errors="replace")


class Processes:
    """All slots."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self.slots = list(slots)
        self.exits: list[Exit] = []
        self._closing = False

    def of(self, module: str) -> list[Slot]:
        """Returns the slots of one module."""
        return [slot for slot in self.slots if slot.module == module]

    def last_code(self, slot: Slot) -> int | None:
        """Returns the code with which a slot's last process ended."""
        return next((end.code for end in reversed(self.exits) if end.slot == slot.name), None)

    async def watch(self) -> None:
        """Starts what has ended again, until it is cancelled."""
        due: dict[Slot, float] = {}
        while True:
            await asyncio.sleep(_LOOK)
            for slot in self.slots:
                assert slot.process is not None
                if slot in due:
                    if time.monotonic() >= due[slot]:
                        del due[slot]
                        slot.start()
                elif slot.process.poll() is not None:
                    self._record(slot)
                    due[slot] = time.monotonic() + slot.pause
                else:
                    slot.look()

    async def close(self, limit: float = 40.0) -> None:
        """Ends all by SIGTERM, and what has not ended after the limit by SIGKILL, which is then on record as such."""
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
            await asyncio.sleep(_LOOK)

    def kill(self) -> None:
        """Ends whatever still runs, at once."""
        for slot in self.slots:
            if slot.process is not None and slot.process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(slot.process.pid, signal.SIGKILL)

    def _record(self, slot: Slot) -> None:
        assert slot.process is not None
        code = slot.process.returncode
        is_short = time.monotonic() < slot.shortage_until
        cause = slot.shortage if slot.shortage and is_short and code > 0 else slot.cause
        was_right = (cause, code) in (("SIGKILL", -signal.SIGKILL), ("SIGTERM", 0)) or cause in SHORTAGES
        tail = "" if was_right else slot.tail()
        self.exits.append(Exit(slot.name, slot.module, time.time(), code, cause, tail, slot.logs[-1].name))


def clean_environment() -> dict[str, str]:
    """Returns this environment without what configures the processes."""
    ours = ("OUTBOX_", "DATABASE_URL", "REDIS_URL", "SMTP_", "MAIL_", "HTTP_SERVER", "PUBLIC_URL", "VERIFY_", "LOG_")
    return {name: value for name, value in os.environ.items() if not name.startswith((*ours, "SECRET_KEY", "TEST_"))}
