"""`python -m tests.chaos.figures`: how long the ones that a fault struck wait, for the faults that have a promise."""

import asyncio
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from tests.chaos.folder import emptied
from tests.chaos.http import post
from tests.chaos.mailserver import Misbehaviour
from tests.chaos.stage import Stage, open_stage

_USERS = 200
_AT_ONCE = 50
"""Requests; of more, the service would refuse some."""
_HELD = 12
_PATIENCE = 60.0


@dataclass(frozen=True)
class Promise:
    """What is measured, and what it may come to."""

    text: str
    limit: float
    """Seconds."""


FIRST_BACK = Promise("Redis is back after a crash: the first of 200 mails", 3)
ALL_BACK = Promise("Redis is back after a crash: all of 200 mails", 5)
FIRST_EMPTIED = Promise("FLUSHALL: the first of 200 mails", 3)
ALL_EMPTIED = Promise("FLUSHALL: all of 200 mails", 5)
WORKER = Promise("a worker is killed: all mails that it held, from another", 20)
RELAY = Promise("a relay is killed: the longest wait of those who sign up then", 1)

Measured = dict[Promise, float]


class Clients:
    """Creates users, and knows when each got the mail."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._port = stage.proxies["service"][0].port
        self._created = 0
        self._at_once = asyncio.Semaphore(_AT_ONCE)

    async def create(self, users: int) -> dict[str, float]:
        """Creates users and returns when each address was acknowledged."""
        numbers = range(self._created, self._created + users)
        self._created += users
        return dict(await asyncio.gather(*map(self._create, numbers)))

    async def got(self, addresses: dict[str, float]) -> list[float]:
        """Waits until each has a mail and returns when those came, in order."""
        async with asyncio.timeout(_PATIENCE):
            while True:
                first: dict[str, float] = {}
                for mail in self._stage.mail.mails:
                    first.setdefault(mail.recipient, mail.accepted)
                if addresses.keys() <= first.keys():
                    return sorted(first[address] for address in addresses)
                await asyncio.sleep(0.02)

    async def _create(self, number: int) -> tuple[str, float]:
        name = f"user_{number}"
        user = {"username": name, "password": "correct horse", "full_name": "A User", "email": f"{name}@example.com"}
        async with self._at_once:
            status, answer = await post(self._port, "/v1/users", user, _PATIENCE)
        assert status == 201, answer
        return user["email"], time.time()


async def crash_redis(stage: Stage, clients: Clients) -> Measured:
    """Redis dies, 200 users sign up, and it comes back empty."""
    stage.redis.send(signal.SIGKILL)
    users = await clients.create(_USERS)
    await stage.redis.start()
    back = time.time()
    got = await clients.got(users)
    return {FIRST_BACK: got[0] - back, ALL_BACK: got[-1] - back}


async def empty_redis(stage: Stage, clients: Clients) -> Measured:
    """200 jobs wait in Redis while the workers are stopped; FLUSHALL takes them, and the workers go on."""
    workers = stage.processes.of("worker")
    for worker in workers:
        worker.send(signal.SIGSTOP)
    await clients.create(_USERS)
    await asyncio.sleep(3)  # all are in Redis, and older than the sweep's grace
    jobs: list[Any] = await stage.redis.client.lrange("rq:queue:critical", 0, -1)
    await stage.redis.client.flushall()
    emptied_at = time.time()
    for worker in workers:
        worker.send(signal.SIGCONT)
    assert len(jobs) >= _USERS - len(workers)  # each worker was waiting for one, and has got it
    async with stage.postgres.connection() as connection:
        rows = [int(job.partition(b"-")[0]) for job in jobs]
        cursor = await connection.execute("SELECT payload ->> 'username' FROM outbox WHERE id = ANY (%s)", [rows])
        struck = {f"{username}@example.com": 0.0 for (username,) in await cursor.fetchall()}
    got = await clients.got(struck)
    return {FIRST_EMPTIED: got[0] - emptied_at, ALL_EMPTIED: got[-1] - emptied_at}


async def kill_worker(stage: Stage, clients: Clients) -> Measured:
    """A worker dies while the mail server keeps it waiting; another one sends what it held."""
    victim, *_ = stage.processes.of("worker")
    stage.mail.misbehaviour = Misbehaviour("dot", "hang")
    creating = asyncio.create_task(clients.create(_HELD * 2))
    held: dict[str, float] = {}
    while len(held) < _HELD // 2:
        await asyncio.sleep(0.02)
        held = {to: 0.0 for to, session in stage.mail.handled.items() if session.worker == victim.number}
    victim.end(signal.SIGKILL, 2)
    killed = time.time()
    stage.mail.misbehaviour = None
    await creating
    return {WORKER: (await clients.got(held))[-1] - killed}


async def kill_relay(stage: Stage, clients: Clients) -> Measured:
    """A relay dies while users sign up one after the other, and is not started again for a while."""
    users: dict[str, float] = {}
    victim, *_ = stage.processes.of("relay")
    killed = False
    begun = time.monotonic()
    while time.monotonic() < begun + 4:
        users |= await clients.create(1)
        if not killed and time.monotonic() > begun + 1:
            victim.end(signal.SIGKILL, 4)
            killed = True
        await asyncio.sleep(0.03)
    await clients.got(users)
    first: dict[str, float] = {}
    for mail in stage.mail.mails:
        first.setdefault(mail.recipient, mail.accepted)
    return {RELAY: max(first[address] - at for address, at in users.items())}


MEASUREMENTS: tuple[Callable[[Stage, Clients], Awaitable[Measured]], ...] = (
    crash_redis,
    empty_redis,
    kill_worker,
    kill_relay,
)


async def measure(folder: Path, times: int) -> dict[Promise, list[float]]:
    """Does each measurement several times on one stage and returns all that came of it."""
    found: dict[Promise, list[float]] = {}
    async with open_stage(folder, {"service": 1, "relay": 2, "worker": 2}, 0, delays=(0.0,)) as stage:
        clients = Clients(stage)
        await clients.create(20)
        for measurement in MEASUREMENTS:
            for _ in range(times):
                for promise, seconds in (await measurement(stage, clients)).items():
                    found.setdefault(promise, []).append(seconds)
                await stage.restore()
                await asyncio.sleep(3)
    return found


@click.command()
@click.option("--times", default=5, show_default=True, type=click.IntRange(min=1), help="Measurements per fault.")
def main(times: int) -> None:
    """Measure how long mails wait after a fault, with default settings, and compare with the promised times."""
    with tempfile.TemporaryDirectory(prefix="chaos-figures-") as folder:
        found = asyncio.run(measure(emptied(Path(folder)), times))
    table = Table(title=f"Seconds, of {times} times each, with default settings")
    table.add_column("what")
    for name in ("median", "worst", "promised"):
        table.add_column(name, justify="right")
    for promise, seconds in found.items():
        table.add_row(promise.text, f"{median(seconds):.2f}", f"{max(seconds):.2f}", f"{promise.limit:g}")
    Console().print(table)
    broken = [promise for promise, seconds in found.items() if max(seconds) > promise.limit]
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
