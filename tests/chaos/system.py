"""Runs the system under test: servers, proxies in every connection, and several of each process."""

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
from tests.chaos.evidence import ForeignJob, SignUp
from tests.chaos.mailserver import MailServer
from tests.chaos.ports import free_port
from tests.chaos.processes import ROOT, Processes, Slot, clean_environment
from tests.chaos.proxy import Proxy
from tests.chaos.servers import Postgres, Redis, ServerStarter
from tests.support.faked_clock import clocked_postgres
from tests.support.redis_pair import replicating

DELAYS = (2.0, 0.0)
"""`VERIFY_EMAIL_DELAY` of the services in turn, in seconds: some mails pass through rq-scheduler's set, some do not."""

LEASE = 15.0
"""Seconds; the product's default."""

_SMTP_TIMEOUT = 3.0
"""Seconds: nearly twice the time of a slow mail, because the machine is busy."""
_SECRET_KEY = "a secret key of the chaos run, 32 characters or more"


@dataclass
class System:
    """The running system, which faults act on."""

    postgres: Postgres
    """The current server; a fail-over replaces it."""
    redis: Redis
    """The current server; a fail-over replaces it."""
    server_starter: ServerStarter
    mail: MailServer
    processes: Processes
    proxies: dict[str, list[Proxy]]
    """By target: `service` and `mail` one per slot, `postgres` one for the rest and one per worker, `redis` one."""
    delays: tuple[float, ...]
    folder: Path
    imported: list[SignUp] = field(default_factory=list)
    """Users that faults wrote directly into Postgres."""
    foreign_jobs: list[ForeignJob] = field(default_factory=list)
    large_rows: list[int] = field(default_factory=list)

    async def restore(self) -> None:
        """Undoes whatever faults may have left behind, and waits until everything is up."""
        self.postgres.resume()
        if self.postgres.clock is not None:
            self.postgres.clock.set_ahead(0)
        self.redis.send(signal.SIGCONT)
        self.mail.misbehaviour = self.mail.connection_limit = None
        for proxy in self.all_proxies():
            proxy.cancel_tears()
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
        """Resumes the servers and closes the connection to Redis, so that the servers can end."""
        self.postgres.resume()
        self.redis.send(signal.SIGCONT)
        await self.redis.close()

    def all_proxies(self) -> list[Proxy]:
        """Returns the proxies of every target."""
        return [proxy for proxies in self.proxies.values() for proxy in proxies]


@asynccontextmanager
async def open_system(
    folder: Path,
    counts: dict[str, int],
    seed: int,
    delays: tuple[float, ...] = DELAYS,
    *,
    has_faked_clock: bool = False,
) -> AsyncGenerator[System]:
    """Starts everything, and ends it at the end of the block.

    Args:
        folder: for data and logs; empty.
        counts: number of processes by module.
        seed: seed of all randomness.
        delays: `VERIFY_EMAIL_DELAY` of the services in turn, in seconds.
        has_faked_clock: whether Postgres' clock can jump.
    """
    async with AsyncExitStack() as stack:
        server_starter = ServerStarter()
        stack.callback(server_starter.close)
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
        system = System(postgres, redis, server_starter, mail, processes, proxies, delays, folder)
        stack.push_async_callback(system.release)
        yield system
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
