"""Faults of the three processes."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

from tests.chaos.faults import Act, Kind
from tests.chaos.mailserver import Misbehaviour
from tests.chaos.processes import Slot

_RESTART = (0.2, 3.0)
"""Seconds until a supervisor starts a process again."""
_START_LIMIT = 60.0
_HANDED_ON = 25.0
"""Seconds until another worker must have what one held that cannot be reached: the lease, and some more."""
_LOOK = 0.02
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
    Kind("worker.part-from-postgres", _part_from_postgres, weight=2, further=("postgres", "mail")),
)
