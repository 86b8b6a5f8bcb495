"""What a fault is, and the lanes in which faults follow each other."""

import asyncio
import random
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tests.chaos.evidence import Fault
from tests.chaos.processes import Slot
from tests.chaos.stage import Stage


@dataclass
class Act:
    """One fault while it lasts: what it may use."""

    stage: Stage
    draw: random.Random
    fault: Fault
    over: asyncio.Event
    """Set when the run wants no faults any more."""

    async def hold(self, shortest: float, longest: float) -> None:
        """Waits for a random time in seconds, or until the run wants no faults any more."""
        seconds = self.draw.uniform(shortest, longest)
        with suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), seconds)

    def strikes(self, slots: Sequence[Slot]) -> None:
        """Takes note of the processes that are struck."""
        self.fault.slots = tuple(slot.name for slot in slots)

    def victims(self, module: str) -> list[Slot]:
        """Returns one process of a module, or now and then all of them."""
        slots = self.stage.processes.of(module)
        chosen = slots if self.draw.random() < 0.25 else [self.draw.choice(slots)]
        self.strikes(chosen)
        return chosen


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    """As in `redis.kill`."""
    inject: Callable[[Act], Awaitable[None]]
    """Begins it, holds it, ends it, and returns when what it struck is there again.

    What is there again earlier, while something of the fault still holds, sets the fault's `end` itself.
    """
    weight: int = 1
    """How often it comes in a round of all kinds."""
    further: tuple[str, ...] = ()
    """What else it strikes besides the target in its name."""

    @property
    def targets(self) -> tuple[str, ...]:
        """What it strikes: no two faults ever strike the same at the same time."""
        return tuple(sorted({self.name.partition(".")[0], *self.further}))


class Injector:
    """All lanes of one run."""

    def __init__(self, stage: Stage, kinds: Sequence[Kind], seed: int, gap: float) -> None:
        """Does nothing yet.

        Args:
            stage: what the faults act on.
            kinds: which faults there are to be.
            seed: the same seed gives each lane the same faults with the same lengths and gaps.
            gap: mean seconds between two faults of a lane.
        """
        self.faults: list[Fault] = []
        self.current: list[Fault] = []
        self._stage = stage
        self._kinds = kinds
        self._seed = seed
        self._gap = gap
        self._busy: dict[str, asyncio.Lock] = {}

    async def run(self, lanes: int, over: asyncio.Event) -> None:
        """Injects faults until `over` is set, and returns when the last of them has ended."""
        async with asyncio.TaskGroup() as group:
            for lane in range(lanes):
                group.create_task(self._lane(random.Random(f"{self._seed} lane {lane}"), over))

    async def _lane(self, draw: random.Random, over: asyncio.Event) -> None:
        deck: list[Kind] = []
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), draw.expovariate(1 / self._gap))
            if not deck:  # every kind comes before any comes again
                deck = [kind for kind in self._kinds for _ in range(kind.weight)]
                draw.shuffle(deck)
            kind = deck.pop()
            chance = random.Random(draw.random())
            locks = [self._busy.setdefault(target, asyncio.Lock()) for target in kind.targets]
            for lock in locks:
                await lock.acquire()
            try:
                if over.is_set():
                    return
                await self._inject(kind, chance, over)
            finally:
                for lock in locks:
                    lock.release()

    async def _inject(self, kind: Kind, draw: random.Random, over: asyncio.Event) -> None:
        fault = Fault(len(self.faults), kind.name, kind.targets, time.time())
        self.faults.append(fault)
        self.current.append(fault)
        try:
            await kind.inject(Act(self._stage, draw, fault, over))
        except Exception:  # noqa: BLE001 - the run goes on, and is judged by it in the end
            fault.crash = traceback.format_exc()
        finally:
            fault.end = fault.end or time.time()
            self.current.remove(fault)
