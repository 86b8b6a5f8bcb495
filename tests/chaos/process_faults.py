"""Faults of the three processes."""

import asyncio
import math
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil

from tests.chaos.faults import Act, Kind
from tests.chaos.mailserver import Misbehaviour
from tests.chaos.processes import Slot

_RESTART = (0.2, 3.0)
"""Seconds until a supervisor starts a process again."""
_START_LIMIT = 60.0
_HANDED_ON = 25.0
"""Seconds until another worker must have what one held that cannot be reached: the lease, and some more."""
_LOOK = 0.02
_WORKS_AGAIN = 60.0
"""Seconds after a shortage by which its worker sends mails again, or another one has been started in its place."""
_ENOUGH = 20
"""Mails of other workers that show that there was something to do."""
_MEMORY = 8 * 1024 * 1024
"""Bytes that a worker may still get, at most."""
_STOP_LIMIT = 45.0
"""Seconds for an end in order: the product's grace of 25 s, its 10 s for the last marks, and some more."""


def _kill(module: str) -> Callable[[Act], Awaitable[None]]:
    async def inject(act: Act) -> None:
        victims = act.victims(module)
        for slot in victims:
            slot.end(signal.SIGKILL, act.draw.uniform(*_RESTART))
        await _await_ready(victims)

    return inject


def _roll(module: str) -> Callable[[Act], Awaitable[None]]:
    async def inject(act: Act) -> None:
        slots = act.stage.processes.of(module)
        act.strikes(slots)
        for slot in slots:
            slot.end(signal.SIGTERM, 0)
            await _await_ready([slot], _STOP_LIMIT)

    return inject


def _pause(module: str, longest: float) -> Callable[[Act], Awaitable[None]]:
    async def inject(act: Act) -> None:
        victims = act.victims(module)
        for slot in victims:
            slot.send(signal.SIGSTOP)
        try:
            await act.hold(0.5, longest)
        finally:
            for slot in victims:
                slot.send(signal.SIGCONT)

    return inject


async def _kill_after_a_mail(act: Act) -> None:
    """Strikes the one window that cannot be closed: the mail is accepted, and nobody has written so."""
    mail = act.stage.mail
    mail.accepted.clear()
    try:
        async with asyncio.timeout(10):
            await mail.accepted.wait()
    except TimeoutError:
        act.fault.note = "no mail came"
        return
    slot = act.stage.processes.of("worker")[mail.mails[-1].worker]
    act.strikes([slot])
    slot.end(signal.SIGKILL, act.draw.uniform(*_RESTART))
    await _await_ready([slot])


async def _part_from_postgres(act: Act) -> None:
    """Parts one worker from Postgres with rows in its hands, until another worker has one of these rows in its own.

    What the first has to say of its attempts, which failed, then comes in the middle of the second's: the fence alone
    keeps it from being written.
    """
    slot, mail = act.draw.choice(act.stage.processes.of("worker")), act.stage.mail
    act.strikes([slot])
    proxy = act.stage.proxies["postgres"][slot.number + 1]
    mail.misbehaviour = Misbehaviour("dot", "hang", worker=slot.number)
    try:
        await act.hold(1.0, 1.5)
        held = {recipient for recipient, session in mail.handled.items() if session.worker == slot.number}
        proxy.close()
        await act.hold(3.0, 3.5)  # beyond the worker's time limit with the mail server
        mail.misbehaviour = Misbehaviour("dot", "slow")
        await _await_another(act, held, slot)
    finally:
        await proxy.open()
        await act.hold(1.0, 2.0)
        mail.misbehaviour = None


async def _await_another(act: Act, held: set[str], slot: Slot) -> None:
    deadline = asyncio.get_running_loop().time() + _HANDED_ON
    while not act.over.is_set() and asyncio.get_running_loop().time() < deadline:
        others = {to for to, session in act.stage.mail.handled.items() if session.worker != slot.number}
        if common := held & others:
            act.fault.note = f"{len(held)} rows in hand, and {len(common)} of them in another's"
            return
        await asyncio.sleep(_LOOK)


async def _take_descriptors(act: Act) -> None:
    """Lets one worker open next to no files or sockets, and cuts its connections to Postgres: it must connect anew."""
    slot = await _one_that_works(act)
    proxy, spare = act.stage.proxies["postgres"][slot.number + 1], act.draw.randrange(3)
    kept = _descriptors(slot.pid, but_to=proxy.port)
    act.fault.note = f"{spare} spare"
    free = [number for number in range(max(kept) + spare + 2) if number not in kept]
    async with _short_of(act, slot, psutil.RLIMIT_NOFILE, free[spare]):
        proxy.cut()
        await act.hold(5, 20)


async def _take_memory(act: Act) -> None:
    """Lets one worker have next to no more memory."""
    slot = await _one_that_works(act)
    spare = act.draw.randrange(_MEMORY)
    act.fault.note = f"{spare // 1024} KiB spare"
    async with _short_of(act, slot, psutil.RLIMIT_AS, psutil.Process(slot.pid).memory_info().vms + spare):
        await act.hold(5, 15)


async def _one_that_works(act: Act) -> Slot:
    slot = act.draw.choice(act.stage.processes.of("worker"))
    await _await_ready([slot])
    act.strikes([slot])
    return slot


def _descriptors(pid: int, but_to: int) -> set[int]:
    """Returns all that a process has open, but for its connections to a port."""
    connections = psutil.Process(pid).net_connections("tcp")
    left_out = {one.fd for one in connections if tuple(one.raddr)[1:] == (but_to,)}
    return {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()} - left_out


@asynccontextmanager
async def _short_of(act: Act, slot: Slot, resource: int, limit: int) -> AsyncGenerator[None]:
    """Lowers one of a process' limits for a while, and waits until it, or another in its place, works again."""
    pid, process = slot.pid, psutil.Process(slot.pid)
    soft, hard = process.rlimit(resource)
    slot.shortage, slot.shortage_until = act.fault.kind, math.inf
    try:
        process.rlimit(resource, (limit, hard))
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.rlimit(resource, (soft, hard))
        act.fault.relieved = time.time()
        slot.shortage_until = time.monotonic() + _STOP_LIMIT  # it may have been about to end, and ends in order
    await _await_work(act, slot, pid)


async def _await_work(act: Act, slot: Slot, pid: int) -> None:
    """Waits for a mail by it; or for the next process of its slot, where it has ended."""
    since, mails = time.time(), act.stage.mail.mails
    first = len(mails)
    while not act.over.is_set():
        if not act.stage.proxies["mail"][slot.number].takes_connections:
            since, first = time.time(), len(mails)  # it could send nothing
        senders = [mail.worker for mail in mails[first:]]
        if slot.pid != pid:
            act.fault.note += f"; ended, code {act.stage.processes.last_code(slot)}"
            await _await_ready([slot])
            return
        if slot.number in senders:
            return
        if time.time() > since + _WORKS_AGAIN and len(senders) >= _ENOUGH:
            raise AssertionError(f"{slot.name} lives and has sent nothing for {_WORKS_AGAIN:g} s")
        await asyncio.sleep(_LOOK)


async def _await_ready(slots: list[Slot], further: float = 0.0) -> None:
    async with asyncio.timeout(_START_LIMIT + further):
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
    # Well below the lease, of which a pause may find two thirds: a worker that was held up must not cost a mail.
    Kind("worker.pause", _pause("worker", 7)),
    Kind("worker.few-descriptors", _take_descriptors),
    Kind("worker.little-memory", _take_memory),
    Kind("worker.part-from-postgres", _part_from_postgres, weight=2, further=("postgres", "mail")),
)
