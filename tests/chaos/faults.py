"""Defines kinds of faults, and injects them in lanes: one fault after another per lane."""

import asyncio
import random
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tests.chaos.evidence import Fault
from tests.chaos.processes import Slot
from tests.chaos.system import System


@dataclass
class Injection:
    """One fault in progress, with what its code may use."""

    system: System
    draw: random.Random
    fault: Fault
    stop: asyncio.Event
    """Set when all faults must end."""

    async def hold(self, shortest: float, longest: float) -> None:
        """Waits for a random number of seconds, or until all faults must end."""
        seconds = self.draw.uniform(shortest, longest)
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), seconds)

    def record_victims(self, slots: Sequence[Slot]) -> None:
        """Records the affected processes."""
        self.fault.slots = tuple(slot.name for slot in slots)

    def choose_victims(self, module: str) -> list[Slot]:
        """Chooses one process of a module, or sometimes all of them, and records them."""
        slots = self.system.processes.of(module)
        chosen = slots if self.draw.random() < 0.25 else [self.draw.choice(slots)]
        self.record_victims(chosen)
        return chosen


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    """Target and fault, such as `redis.kill`."""
    inject: Callable[[Injection], Awaitable[None]]
    """Begins, holds and ends the fault, and returns when its target is available again.

    It sets the fault's `end` itself if the target is available before all of the fault is over.
    """
    weight: int = 1
    """How often it occurs in a round of all kinds."""
    further_targets: tuple[str, ...] = ()
    """Targets besides the one in its name."""

    @property
    def targets(self) -> tuple[str, ...]:
        """All its targets: two faults never have the same target at the same time."""
        return tuple(sorted({self.name.partition(".")[0], *self.further_targets}))


class Injector:
    """Runs the lanes of one run."""

    def __init__(self, system: System, kinds: Sequence[Kind], seed: int, gap: float) -> None:
        """Does not start yet.

        Args:
            system: what the faults act on.
            kinds: which faults to inject.
            seed: the same seed gives each lane the same faults with the same lengths and gaps.
            gap: mean seconds between two faults of a lane.
        """
        self.faults: list[Fault] = []
        self.current: list[Fault] = []
        self._system = system
        self._kinds = kinds
        self._seed = seed
        self._gap = gap
        self._busy: dict[str, asyncio.Lock] = {}

    async def run(self, lanes: int, stop: asyncio.Event) -> None:
        """Injects faults until `stop` is set, and returns when the last of them has ended."""
        async with asyncio.TaskGroup() as group:
            for lane in range(lanes):
                group.create_task(self._run_lane(random.Random(f"{self._seed} lane {lane}"), stop))

    async def _run_lane(self, draw: random.Random, stop: asyncio.Event) -> None:
        deck: list[Kind] = []
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), draw.expovariate(1 / self._gap))
            if not deck:  # every kind occurs before any occurs again
                deck = [kind for kind in self._kinds for _ in range(kind.weight)]
                draw.shuffle(deck)
            kind = deck.pop()
            chance = random.Random(draw.random())
            locks = [self._busy.setdefault(target, asyncio.Lock()) for target in kind.targets]
            for lock in locks:
                await lock.acquire()
            try:
                if stop.is_set():
                    return
                await self._inject(kind, chance, stop)
            finally:
                for lock in locks:
                    lock.release()

    async def _inject(self, kind: Kind, draw: random.Random, stop: asyncio.Event) -> None:
        fault = Fault(len(self.faults), kind.name, kind.targets, time.time())
        self.faults.append(fault)
        self.current.append(fault)
        try:
            await kind.inject(Injection(self._system, draw, fault, stop))
        except Exception:  # noqa: BLE001 - the run continues, and the judge reports it
            fault.crash = traceback.format_exc()
        finally:
            fault.end = fault.end or time.time()
            self.current.remove(fault)
