"""One run, from the first user to the evidence."""

import asyncio
import math
import random
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos import logbook
from tests.chaos.evidence import Evidence
from tests.chaos.faults import Injector, Kind
from tests.chaos.foreign_faults import look
from tests.chaos.large_row_faults import read_runs
from tests.chaos.load import Load
from tests.chaos.observer import Observer
from tests.chaos.progress import tell
from tests.chaos.pulse import Pulse
from tests.chaos.server_faults import CLOCK_JUMP, LONGEST_JUMP
from tests.chaos.stage import LEASE, Stage, open_stage

_WARM_UP = 2.0
"""Seconds of load before the first fault."""
_LATEST = 60.0
"""Seconds after the last row is due, or after fewer rows are left than before, by which all must be done or dead."""
_LONGEST_CALM = 900.0


@dataclass(frozen=True)
class Options:
    """What a run is to be like."""

    minutes: float
    rate: float
    seed: int
    counts: dict[str, int]
    kinds: tuple[Kind, ...]
    lanes: int
    gap: float
    folder: Path


async def run(options: Options) -> tuple[Evidence, Observer]:
    """Runs it, and returns what it left behind."""
    evidence = Evidence(options.seed, (), LEASE)
    has_faked_clock = any(kind.name == CLOCK_JUMP for kind in options.kinds)
    opened = open_stage(options.folder, options.counts, options.seed, has_faked_clock=has_faked_clock)
    async with opened as stage, AsyncExitStack() as stack:
        evidence.delays = stage.delays
        observer, pulse = Observer(stage), Pulse()
        ports = [proxy.port for proxy in stage.proxies["service"]]
        load = Load(ports, options.rate, random.Random(f"{options.seed} load"))
        stack.push_async_callback(load.close)
        injector = Injector(stage, options.kinds, options.seed, options.gap)
        _run_beside(stack, observer.run())
        _run_beside(stack, pulse.run())
        _run_beside(stack, tell(lambda: _line(load, stage, injector, observer)))
        await _cause_chaos(options, stage, load, injector)
        evidence.calm = time.time()
        await _await_calm(stage, observer)
        evidence.users, evidence.rows = await observer.snapshot()
        await look(stage.redis, stage.foreign)
    # The processes have ended by now, and their ends count.
    evidence.attempts, evidence.faults = [*load.attempts, *stage.imported], injector.faults
    evidence.foreign, evidence.large_rows = stage.foreign, stage.large_rows
    evidence.runs = read_runs(options.folder)
    evidence.mails, evidence.sessions = stage.mail.mails, stage.mail.sessions
    evidence.overlaps, evidence.refused = stage.mail.overlaps, stage.mail.refused
    evidence.cuts = [cut for proxy in stage.proxies["mail"] for cut in proxy.cuts]
    evidence.lags = pulse.lags
    evidence.exits = stage.processes.exits
    evidence.lines, evidence.crashes = logbook.read(options.folder / "logs")
    evidence.bombs = len(list((options.folder / "bombs").iterdir()))
    return evidence, observer


async def _cause_chaos(options: Options, stage: Stage, load: Load, injector: Injector) -> None:
    over = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run(over))
        await asyncio.sleep(_WARM_UP)
        group.create_task(injector.run(options.lanes, over))
        try:
            await asyncio.sleep(options.minutes * 60 - _WARM_UP)
        finally:
            over.set()  # also where the run is cut short: a library may swallow a fault's cancellation
    await stage.restore()


async def _await_calm(stage: Stage, observer: Observer) -> None:
    """Waits until every row is done or dead, as long as that may take; what is not by then, the judge will name.

    What was written while Postgres' clock was ahead is due when the true time has got there: it jumps there at last.
    """
    await _await_done(observer)
    if stage.postgres.clock is not None and (await observer.waiting())[0]:
        stage.postgres.clock.set_ahead(LONGEST_JUMP)
        await _await_done(observer)


async def _await_done(observer: Observer) -> None:
    longest = time.time() + _LONGEST_CALM
    limit, fewest = time.time() + _LATEST, math.inf
    while time.time() < min(limit, longest):
        rows, due_in = await observer.waiting(_LONGEST_CALM)
        if not rows:
            return
        limit = max(limit, time.time() + due_in + _LATEST)
        if rows < fewest:
            fewest, limit = rows, max(limit, time.time() + _LATEST)
        await asyncio.sleep(0.5)


def _run_beside(stack: AsyncExitStack, coroutine: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(coroutine)

    async def end() -> None:
        task.cancel()
        await asyncio.wait([task])

    stack.push_async_callback(end)


def _line(load: Load, stage: Stage, injector: Injector, observer: Observer) -> str:
    states = " ".join(f"{name} {count}" for name, count in sorted(observer.states.items()))
    faults = ", ".join(fault.kind for fault in injector.current) or "–"  # noqa: RUF001 - a dash for none
    return (
        f"users {len(load.acknowledged)}  mails {len(stage.mail.mails)}  faults {len(injector.faults)}  "
        f"now {faults}  rows {states}"
    )
