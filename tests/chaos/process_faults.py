"""Injects faults of the three processes."""

import asyncio
import math
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil

from tests.chaos.faults import Injection, Kind
from tests.chaos.mailserver import Misbehaviour
from tests.chaos.processes import Slot

_RESTART = (0.2, 3.0)
"""Seconds until a supervisor restarts a process."""
_START_LIMIT = 60.0
_TAKEOVER_LIMIT = 25.0
"""Seconds until another worker must have the rows of an unreachable one: the lease, and a margin."""
_POLL = 0.02
_RECOVERY_LIMIT = 60.0
"""Seconds after a shortage within which its worker sends mails again, or has been replaced."""
_ENOUGH = 20
"""Mails of other workers that show that there was work to do."""
_MEMORY = 8 * 1024 * 1024
"""Upper bound of the bytes that a worker can still allocate."""
_STOP_LIMIT = 45.0
"""Seconds for an orderly exit: the product's grace of 25 s, its 10 s for the last outcomes, and a margin."""


def _kill(module: str) -> Callable[[Injection], Awaitable[None]]:
    async def inject(injection: Injection) -> None:
        victims = injection.choose_victims(module)
        for slot in victims:
            slot.end(signal.SIGKILL, injection.draw.uniform(*_RESTART))
        await _await_ready(victims)

    return inject


def _roll(module: str) -> Callable[[Injection], Awaitable[None]]:
    async def inject(injection: Injection) -> None:
        slots = injection.system.processes.of(module)
        injection.record_victims(slots)
        for slot in slots:
            slot.end(signal.SIGTERM, 0)
            await _await_ready([slot], _STOP_LIMIT)

    return inject


def _pause(module: str, longest: float) -> Callable[[Injection], Awaitable[None]]:
    async def inject(injection: Injection) -> None:
        victims = injection.choose_victims(module)
        for slot in victims:
            slot.send(signal.SIGSTOP)
        try:
            await injection.hold(0.5, longest)
        finally:
            for slot in victims:
                slot.send(signal.SIGCONT)

    return inject


async def _kill_after_a_mail(injection: Injection) -> None:
    """Hits the one gap that cannot be closed: the mail is accepted, and the outcome is not written."""
    mail = injection.system.mail
    mail.accepted.clear()
    try:
        async with asyncio.timeout(10):
            await mail.accepted.wait()
    except TimeoutError:
        injection.fault.note = "no mail came"
        return
    slot = injection.system.processes.of("worker")[mail.mails[-1].worker]
    injection.record_victims([slot])
    slot.end(signal.SIGKILL, injection.draw.uniform(*_RESTART))
    await _await_ready([slot])


async def _part_from_postgres(injection: Injection) -> None:
    """Cuts one worker off from Postgres while it holds rows, until another worker holds one of them.

    The outcomes of its failed attempts then arrive in the middle of the other's attempts: only the fence keeps them
    from being written.
    """
    slot, mail = injection.draw.choice(injection.system.processes.of("worker")), injection.system.mail
    injection.record_victims([slot])
    proxy = injection.system.proxies["postgres"][slot.number + 1]
    mail.misbehaviour = Misbehaviour("dot", "hang", worker=slot.number)
    try:
        await injection.hold(1.0, 1.5)
        held = {recipient for recipient, session in mail.sessions_by_recipient.items() if session.worker == slot.number}
        proxy.close()
        await injection.hold(3.0, 3.5)  # beyond the worker's time limit with the mail server
        mail.misbehaviour = Misbehaviour("dot", "slow")
        await _await_takeover(injection, held, slot)
    finally:
        await proxy.open()
        await injection.hold(1.0, 2.0)
        mail.misbehaviour = None


async def _await_takeover(injection: Injection, held: set[str], slot: Slot) -> None:
    deadline = asyncio.get_running_loop().time() + _TAKEOVER_LIMIT
    while not injection.stop.is_set() and asyncio.get_running_loop().time() < deadline:
        others = {
            to for to, session in injection.system.mail.sessions_by_recipient.items() if session.worker != slot.number
        }
        if common := held & others:
            injection.fault.note = f"{len(held)} rows held, and {len(common)} of them taken over"
            return
        await asyncio.sleep(_POLL)


async def _take_descriptors(injection: Injection) -> None:
    """Leaves one worker almost no file descriptors, and cuts its connections to Postgres, so that it must reconnect."""
    slot = await _choose_worker(injection)
    proxy, spare = injection.system.proxies["postgres"][slot.number + 1], injection.draw.randrange(3)
    kept = _descriptors(slot.pid, except_to=proxy.port)
    injection.fault.note = f"{spare} spare"
    free = [number for number in range(max(kept) + spare + 2) if number not in kept]
    async with _short_of(injection, slot, psutil.RLIMIT_NOFILE, free[spare]):
        proxy.cut()
        await injection.hold(5, 20)


async def _take_memory(injection: Injection) -> None:
    """Leaves one worker almost no more memory."""
    slot = await _choose_worker(injection)
    spare = injection.draw.randrange(_MEMORY)
    injection.fault.note = f"{spare // 1024} KiB spare"
    async with _short_of(injection, slot, psutil.RLIMIT_AS, psutil.Process(slot.pid).memory_info().vms + spare):
        await injection.hold(5, 15)


async def _choose_worker(injection: Injection) -> Slot:
    slot = injection.draw.choice(injection.system.processes.of("worker"))
    await _await_ready([slot])
    injection.record_victims([slot])
    return slot


def _descriptors(pid: int, except_to: int) -> set[int]:
    """Returns the open file descriptors of a process, without its connections to a port."""
    connections = psutil.Process(pid).net_connections("tcp")
    left_out = {one.fd for one in connections if tuple(one.raddr)[1:] == (except_to,)}
    return {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()} - left_out


@asynccontextmanager
async def _short_of(injection: Injection, slot: Slot, resource: int, limit: int) -> AsyncGenerator[None]:
    """Lowers a resource limit of a process for a while, and waits until it, or its replacement, works again."""
    pid, process = slot.pid, psutil.Process(slot.pid)
    soft, hard = process.rlimit(resource)
    slot.shortage, slot.shortage_until = injection.fault.kind, math.inf
    try:
        process.rlimit(resource, (limit, hard))
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.rlimit(resource, (soft, hard))
        injection.fault.relieved = time.time()
        slot.shortage_until = time.monotonic() + _STOP_LIMIT  # an orderly exit may already have begun
    await _await_recovery(injection, slot, pid)


async def _await_recovery(injection: Injection, slot: Slot, pid: int) -> None:
    """Waits for a mail from a process, or for its replacement if it has ended."""
    since, mails = time.time(), injection.system.mail.mails
    first = len(mails)
    while not injection.stop.is_set():
        if not injection.system.proxies["mail"][slot.number].is_accepting:
            since, first = time.time(), len(mails)  # it cannot send
        senders = [mail.worker for mail in mails[first:]]
        if slot.pid != pid:
            injection.fault.note += f"; exited with code {injection.system.processes.last_code(slot)}"
            await _await_ready([slot])
            return
        if slot.number in senders:
            return
        if time.time() > since + _RECOVERY_LIMIT and len(senders) >= _ENOUGH:
            raise AssertionError(f"{slot.name} runs, but has sent no mail for {_RECOVERY_LIMIT:g} s")
        await asyncio.sleep(_POLL)


async def _await_ready(slots: list[Slot], extra_time: float = 0.0) -> None:
    async with asyncio.timeout(_START_LIMIT + extra_time):
        for slot in slots:
            await slot.ready.wait()


KINDS = (
    Kind("service.kill", _kill("service"), weight=2),
    Kind("relay.kill", _kill("relay"), weight=2),
    Kind("worker.kill", _kill("worker"), weight=3),
    Kind("worker.kill-after-250", _kill_after_a_mail, weight=2),
    Kind("service.roll", _roll("service")),
    Kind("relay.roll", _roll("relay")),
    Kind("worker.roll", _roll("worker")),
    Kind("service.pause", _pause("service", 8)),
    Kind("relay.pause", _pause("relay", 12)),
    # Well below the lease, of which two thirds may be left: a pause must not cause a second mail.
    Kind("worker.pause", _pause("worker", 7)),
    Kind("worker.few-descriptors", _take_descriptors),
    Kind("worker.little-memory", _take_memory),
    Kind("worker.part-from-postgres", _part_from_postgres, weight=2, further_targets=("postgres", "mail")),
)
