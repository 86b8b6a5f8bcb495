"""`python -m tests.chaos.recovery_times`: measures how long mails wait after faults with a promised recovery time."""

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

from tests.chaos.http import post
from tests.chaos.mailserver import Misbehaviour
from tests.chaos.results_folder import prepare_folder
from tests.chaos.system import System, open_system

_USERS = 200
_MAX_REQUESTS = 50
"""Concurrent requests; the service would refuse some of more."""
_HELD = 12
_PATIENCE = 60.0
"""Seconds."""


@dataclass(frozen=True)
class Promise:
    """A measured time and its limit."""

    text: str
    limit: float
    """Seconds."""


FIRST_BACK = Promise("Redis is back after a crash: the first of 200 mails", 3)
ALL_BACK = Promise("Redis is back after a crash: all of 200 mails", 5)
FIRST_EMPTIED = Promise("FLUSHALL: the first of 200 mails", 3)
ALL_EMPTIED = Promise("FLUSHALL: all of 200 mails", 5)
WORKER = Promise("a worker is killed: all mails that it held, from another", 20)
RELAY = Promise("a relay is killed: the longest wait of users who sign up then", 1)

Measured = dict[Promise, float]


class Clients:
    """Creates users, and waits for their mails."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._port = system.proxies["service"][0].port
        self._created = 0
        self._requests = asyncio.Semaphore(_MAX_REQUESTS)

    async def create(self, users: int) -> dict[str, float]:
        """Creates users, and returns when each address was acknowledged."""
        numbers = range(self._created, self._created + users)
        self._created += users
        return dict(await asyncio.gather(*map(self._create, numbers)))

    async def await_mails(self, addresses: dict[str, float]) -> list[float]:
        """Waits until each address has a mail, and returns the sorted times of these mails."""
        async with asyncio.timeout(_PATIENCE):
            while True:
                first: dict[str, float] = {}
                for mail in self._system.mail.mails:
                    first.setdefault(mail.recipient, mail.accepted)
                if addresses.keys() <= first.keys():
                    return sorted(first[address] for address in addresses)
                await asyncio.sleep(0.02)

    async def _create(self, number: int) -> tuple[str, float]:
        name = f"user_{number}"
        user = {"username": name, "password": "correct horse", "full_name": "A User", "email": f"{name}@example.com"}
        async with self._requests:
            status, answer, _ = await post(self._port, "/v1/users", user, _PATIENCE)
        assert status == 201, answer
        return user["email"], time.time()


async def crash_redis(system: System, clients: Clients) -> Measured:
    """Kills Redis, creates 200 users, and restarts Redis empty."""
    system.redis.send(signal.SIGKILL)
    users = await clients.create(_USERS)
    await system.redis.start()
    back = time.time()
    got = await clients.await_mails(users)
    return {FIRST_BACK: got[0] - back, ALL_BACK: got[-1] - back}


async def empty_redis(system: System, clients: Clients) -> Measured:
    """Pauses the workers, fills Redis with 200 jobs, deletes them by FLUSHALL, and resumes the workers."""
    workers = system.processes.of("worker")
    for worker in workers:
        worker.send(signal.SIGSTOP)
    await clients.create(_USERS)
    await asyncio.sleep(3)  # all are in Redis, and older than the sweep's grace
    jobs: list[Any] = await system.redis.client.lrange("rq:queue:critical", 0, -1)
    await system.redis.client.flushall()
    emptied_at = time.time()
    for worker in workers:
        worker.send(signal.SIGCONT)
    assert len(jobs) >= _USERS - len(workers)  # each worker was waiting for a job, and got one
    async with system.postgres.connection() as connection:
        rows = [int(job.partition(b"-")[0]) for job in jobs]
        cursor = await connection.execute("SELECT payload ->> 'username' FROM outbox WHERE id = ANY (%s)", [rows])
        affected = {f"{username}@example.com": 0.0 for (username,) in await cursor.fetchall()}
    got = await clients.await_mails(affected)
    return {FIRST_EMPTIED: got[0] - emptied_at, ALL_EMPTIED: got[-1] - emptied_at}


async def kill_worker(system: System, clients: Clients) -> Measured:
    """Kills a worker while it waits for the mail server, so that another one sends the mails that it held."""
    victim, *_ = system.processes.of("worker")
    system.mail.misbehaviour = Misbehaviour("dot", "hang")
    creating = asyncio.create_task(clients.create(_HELD * 2))
    held: dict[str, float] = {}
    while len(held) < _HELD // 2:
        await asyncio.sleep(0.02)
        held = {to: 0.0 for to, session in system.mail.sessions_by_recipient.items() if session.worker == victim.number}
    victim.end(signal.SIGKILL, 2)
    killed = time.time()
    system.mail.misbehaviour = None
    await creating
    return {WORKER: (await clients.await_mails(held))[-1] - killed}


async def kill_relay(system: System, clients: Clients) -> Measured:
    """Kills a relay while users sign up one by one, and restarts it 4 s later."""
    users: dict[str, float] = {}
    victim, *_ = system.processes.of("relay")
    is_killed = False
    begun = time.monotonic()
    while time.monotonic() < begun + 4:
        users |= await clients.create(1)
        if not is_killed and time.monotonic() > begun + 1:
            victim.end(signal.SIGKILL, 4)
            is_killed = True
        await asyncio.sleep(0.03)
    await clients.await_mails(users)
    first: dict[str, float] = {}
    for mail in system.mail.mails:
        first.setdefault(mail.recipient, mail.accepted)
    return {RELAY: max(first[address] - at for address, at in users.items())}


MEASUREMENTS: tuple[Callable[[System, Clients], Awaitable[Measured]], ...] = (
    crash_redis,
    empty_redis,
    kill_worker,
    kill_relay,
)


async def measure(folder: Path, times: int) -> dict[Promise, list[float]]:
    """Takes each measurement several times on one system, and returns all results in seconds."""
    results: dict[Promise, list[float]] = {}
    async with open_system(folder, {"service": 1, "relay": 2, "worker": 2}, 0, delays=(0.0,)) as system:
        clients = Clients(system)
        await clients.create(20)
        for measurement in MEASUREMENTS:
            for _ in range(times):
                for promise, seconds in (await measurement(system, clients)).items():
                    results.setdefault(promise, []).append(seconds)
                await system.restore()
                await asyncio.sleep(3)
    return results


@click.command()
@click.option("--times", default=5, show_default=True, type=click.IntRange(min=1), help="Measurements per fault.")
def main(times: int) -> None:
    """Measure how long mails wait after a fault, with default settings, and compare with the promised times."""
    with tempfile.TemporaryDirectory(prefix="chaos-figures-") as folder:
        results = asyncio.run(measure(prepare_folder(Path(folder)), times))
    table = Table(title=f"Recovery times in seconds, {times} measurements each, with default settings")
    table.add_column("")
    for name in ("median", "worst", "promised"):
        table.add_column(name, justify="right")
    for promise, seconds in results.items():
        table.add_row(promise.text, f"{median(seconds):.2f}", f"{max(seconds):.2f}", f"{promise.limit:g}")
    Console().print(table)
    broken = [promise for promise, seconds in results.items() if max(seconds) > promise.limit]
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
