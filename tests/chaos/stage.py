"""All that runs: servers, proxies between, the mail server, and several of each process."""

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from outbox.devstack.embedded import embedded_postgres, embedded_redis
from tests.chaos import handlers
from tests.chaos.evidence import Attempt, ForeignJob
from tests.chaos.mailserver import MailServer
from tests.chaos.ports import free_port
from tests.chaos.processes import ROOT, Processes, Slot, clean_environment
from tests.chaos.proxy import Proxy
from tests.chaos.servers import Postgres, Redis, Spares
from tests.support.faked_clock import clocked_postgres
from tests.support.redis_pair import replicating

DELAYS = (2.0, 0.0)
"""`VERIFY_EMAIL_DELAY` of the services in turn: rq-scheduler's set has a part in some mails, and none in others."""

LEASE = 15.0
"""Seconds; the product's default, which it runs with."""

_SMTP_TIMEOUT = 3.0
"""Seconds: nearly twice as long as the mail server takes when it is slow, on a machine that is busy besides."""
_SECRET_KEY = "a secret key of the chaos run, 32 characters or more"


@dataclass
class Stage:
    """What faults act on, and the load runs against."""

    postgres: Postgres
    """Whoever it is at present, as of Redis: a fail-over puts another one in its place."""
    redis: Redis
    spares: Spares
    """What starts further servers."""
    mail: MailServer
    processes: Processes
    proxies: dict[str, list[Proxy]]
    """By target: `service` and `mail` one per slot, `postgres` one per worker and one for all else, `redis` one."""
    delays: tuple[float, ...]
    folder: Path
    imported: list[Attempt] = field(default_factory=list)
    """Users that faults have written straight into Postgres."""
    foreign: list[ForeignJob] = field(default_factory=list)
    large_rows: list[int] = field(default_factory=list)

    async def restore(self) -> None:
        """Ends whatever a fault may have left in force, and waits until all is up."""
        self.postgres.resume()
        if self.postgres.clock is not None:
            self.postgres.clock.set_ahead(0)
        self.redis.send(signal.SIGCONT)
        self.mail.misbehaviour = self.mail.most = None
        for proxy in self.all_proxies():
            proxy.mend()
            await proxy.open()
        for slot in self.processes.slots:
            slot.send(signal.SIGCONT)
        await self.postgres.await_up()
        await self.redis.await_up()
        await self.redis.client.replicaof("NO", "ONE")
        await self.redis.client.config_set("maxmemory", 0)
        async with asyncio.timeout(60):
            for slot in self.processes.slots:
                await slot.ready.wait()

    async def release(self) -> None:
        """Lets go of the servers, so that they can be ended."""
        self.postgres.resume()
        self.redis.send(signal.SIGCONT)
        await self.redis.close()

    def all_proxies(self) -> list[Proxy]:
        """Returns the proxies of every target."""
        return [proxy for proxies in self.proxies.values() for proxy in proxies]


@asynccontextmanager
async def open_stage(
    folder: Path,
    counts: dict[str, int],
    seed: int,
    delays: tuple[float, ...] = DELAYS,
    *,
    has_faked_clock: bool = False,
) -> AsyncGenerator[Stage]:
    """Starts everything, and ends it when the block is left.

    Args:
        folder: for data and logs; emptied before.
        counts: how many of each process.
        seed: of whatever is random in it.
        delays: `VERIFY_EMAIL_DELAY` of the services in turn, in seconds.
        has_faked_clock: whether Postgres' clock can be made to jump.
    """
    async with AsyncExitStack() as stack:
        spares = Spares()
        stack.callback(spares.close)
        postgres = _postgres(stack, folder / "postgres", has_faked_clock=has_faked_clock)
        redis = Redis(stack.enter_context(embedded_redis(folder / "redis", settings=replicating(free_port()))))
        _migrate(postgres.url)
        mail = MailServer(folder, random.Random(f"{seed} mail"))
        stack.callback(mail.close)
        delays = tuple(delays[number % len(delays)] for number in range(counts["service"]))
        ports = [free_port() for _ in delays]
        workers = range(counts["worker"])
        proxies = {
            "service": [Proxy(f"service-{number}", port) for number, port in enumerate(ports)],
            "mail": [Proxy(f"mail-{number}", await mail.listen(number)) for number in workers],
            "postgres": [
                Proxy("postgres", postgres.socket),
                *(Proxy(f"postgres-{n}", postgres.socket) for n in workers),
            ],
            "redis": [Proxy("redis", redis.socket)],
        }
        for proxy in (proxy for group in proxies.values() for proxy in group):
            await proxy.open()
            stack.callback(proxy.close)
        logs = folder / "logs"
        slots = []
        for module, count in counts.items():
            for number in range(count):
                environment = _environment(module, number, proxies, mail.authority)
                if module == "service":
                    environment["HTTP_SERVER_ADDRESS"] = f"127.0.0.1:{ports[number]}"
                    environment["VERIFY_EMAIL_DELAY"] = str(delays[number])
                if module == "worker":
                    environment |= handlers.environment(number, folder)
                slots.append(Slot(module, number, environment, logs))
        processes = Processes(slots)
        stack.callback(processes.kill)
        for slot in slots:
            slot.start()
        watching = asyncio.create_task(processes.watch())
        stack.callback(watching.cancel)
        async with asyncio.timeout(60):
            for slot in slots:
                await slot.ready.wait()
        stage = Stage(postgres, redis, spares, mail, processes, proxies, delays, folder)
        stack.push_async_callback(stage.release)
        yield stage
        watching.cancel()
        await processes.close()


def _postgres(stack: AsyncExitStack, folder: Path, *, has_faked_clock: bool) -> Postgres:
    if has_faked_clock:
        clocked = stack.enter_context(clocked_postgres(folder))
        return Postgres(clocked.server, clocked.clock)
    return Postgres(stack.enter_context(embedded_postgres(folder)))


def _environment(module: str, number: int, proxies: dict[str, list[Proxy]], authority: Path) -> dict[str, str]:
    database = proxies["postgres"][number + 1 if module == "worker" else 0]
    environment = {
        "DATABASE_URL": f"postgresql://outbox@127.0.0.1:{database.port}/outbox",
        "REDIS_URL": f"redis://127.0.0.1:{proxies['redis'][0].port}/0",
        "MAIL_FROM": "Sign-up <no-reply@example.com>",
        "PUBLIC_URL": "https://example.com",
        "SECRET_KEY": _SECRET_KEY,
        "LOG_FORMAT": "json",
    }
    if module == "worker":
        environment |= {
            "SMTP_URL": f"smtp+starttls://user:password@127.0.0.1:{proxies['mail'][number].port}",
            "SSL_CERT_FILE": str(authority),
            "OUTBOX_SMTP_TIMEOUT": str(_SMTP_TIMEOUT),
        }
    return environment


def _migrate(url: str) -> None:
    command = [sys.executable, "-m", "outbox", "migrate"]
    environment = {**clean_environment(), "DATABASE_URL": url}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
