"""Runs the chaos run, from the start of the servers to the evidence."""

import asyncio
import math
import random
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos import process_logs
from tests.chaos.evidence import Evidence
from tests.chaos.faults import Injector, Kind
from tests.chaos.foreign_faults import record_sightings
from tests.chaos.lag_monitor import LagMonitor
from tests.chaos.large_row_faults import read_runs
from tests.chaos.load import Load
from tests.chaos.observer import Observer
from tests.chaos.progress import print_progress
from tests.chaos.server_faults import CLOCK_JUMP, LONGEST_JUMP
from tests.chaos.system import LEASE, System, open_system

_WARM_UP = 2.0
"""Seconds of load before the first fault."""
_SETTLING_LIMIT = 60.0
"""Seconds after the last row is due, or after the last progress, within which all rows must be done or dead."""
_MAX_SETTLING = 900.0
"""Seconds."""


@dataclass(frozen=True)
class Options:
    """Options of a run."""

    minutes: float
    rate: float
    seed: int
    counts: dict[str, int]
    kinds: tuple[Kind, ...]
    lanes: int
    gap: float
    folder: Path


async def run(options: Options) -> tuple[Evidence, Observer]:
    """Runs the system under faults, and returns the evidence and the observer."""
    evidence = Evidence(options.seed, (), LEASE)
    has_faked_clock = any(kind.name == CLOCK_JUMP for kind in options.kinds)
    opened = open_system(options.folder, options.counts, options.seed, has_faked_clock=has_faked_clock)
    async with opened as system, AsyncExitStack() as stack:
        evidence.delays = system.delays
        observer, lag_monitor = Observer(system), LagMonitor()
        ports = [proxy.port for proxy in system.proxies["service"]]
        load = Load(ports, options.rate, random.Random(f"{options.seed} load"))
        stack.push_async_callback(load.close)
        injector = Injector(system, options.kinds, options.seed, options.gap)
        _start_task(stack, observer.run())
        _start_task(stack, lag_monitor.run())
        _start_task(stack, print_progress(lambda: _progress_line(load, system, injector, observer)))
        await _cause_chaos(options, system, load, injector)
        evidence.faults_over_at = time.time()
        await _await_settled(system, observer)
        evidence.users, evidence.rows = await observer.snapshot()
        await record_sightings(system.redis, system.foreign_jobs)
    # The processes have ended by now: the evidence includes their exits.
    evidence.sign_ups, evidence.faults = [*load.sign_ups, *system.imported], injector.faults
    evidence.foreign_jobs, evidence.large_rows = system.foreign_jobs, system.large_rows
    evidence.handler_runs = read_runs(options.folder)
    evidence.mails, evidence.sessions = system.mail.mails, system.mail.sessions
    evidence.overlaps, evidence.refused_addresses = system.mail.overlaps, system.mail.refused_addresses
    evidence.cuts = [cut for proxy in system.proxies["mail"] for cut in proxy.cuts]
    evidence.lags = lag_monitor.lags
    evidence.exits = system.processes.exits
    evidence.log_lines, evidence.tracebacks = process_logs.read(options.folder / "logs")
    evidence.loaded_bombs = len(list((options.folder / "bombs").iterdir()))
    return evidence, observer


async def _cause_chaos(options: Options, system: System, load: Load, injector: Injector) -> None:
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run(stop))
        await asyncio.sleep(_WARM_UP)
        group.create_task(injector.run(options.lanes, stop))
        try:
            await asyncio.sleep(options.minutes * 60 - _WARM_UP)
        finally:
            stop.set()  # also if the run is cancelled: a library may swallow the cancellation of a fault
    await system.restore()


async def _await_settled(system: System, observer: Observer) -> None:
    """Waits until every row is done or dead, or a limit has passed: then the judge reports the rest.

    Rows written while Postgres' clock was ahead are due at that time: at the end, the clock jumps there.
    """
    await _await_done(observer)
    if system.postgres.clock is not None and (await observer.count_waiting())[0]:
        system.postgres.clock.set_ahead(LONGEST_JUMP)
        await _await_done(observer)


async def _await_done(observer: Observer) -> None:
    longest = time.time() + _MAX_SETTLING
    limit, fewest = time.time() + _SETTLING_LIMIT, math.inf
    while time.time() < min(limit, longest):
        rows, due_in = await observer.count_waiting(_MAX_SETTLING)
        if not rows:
            return
        limit = max(limit, time.time() + due_in + _SETTLING_LIMIT)
        if rows < fewest:
            fewest, limit = rows, max(limit, time.time() + _SETTLING_LIMIT)
        await asyncio.sleep(0.5)


def _start_task(stack: AsyncExitStack, coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine as a task that ends with the stack."""
    task = asyncio.create_task(coroutine)

    async def end() -> None:
        task.cancel()
        await asyncio.wait([task])

    stack.push_async_callback(end)


def _progress_line(load: Load, system: System, injector: Injector, observer: Observer) -> str:
    states = " ".join(f"{name} {count}" for name, count in sorted(observer.states.items()))
    faults = ", ".join(fault.kind for fault in injector.current) or "–"  # noqa: RUF001 - a dash for no value
    return (
        f"users {len(load.acknowledged)}  mails {len(system.mail.mails)}  faults {len(injector.faults)}  "
        f"now {faults}  rows {states}"
    )
