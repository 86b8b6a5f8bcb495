"""Controls Postgres and Redis by signals and administrative connections."""

import asyncio
import signal
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, LiteralString
from urllib.parse import parse_qs, unquote, urlsplit

import psutil
import psycopg
import redis.asyncio

from outbox.devstack.embedded import EmbeddedServer
from tests.support.faked_clock import FakedClock

OBSERVER = "chaos"
"""The application name of the chaos run's connections to Postgres, which no fault ends."""

_CLIENTS: LiteralString = (
    f"FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name <> '{OBSERVER}'"
)
_POLL = 0.05
_START_LIMIT = 60.0


class Postgres:
    """The Postgres server, and direct connections to it."""

    def __init__(self, server: EmbeddedServer, clock: FakedClock | None = None) -> None:
        self._server = server
        self.clock = clock
        """The server's faked clock; None if it has the true time."""
        self.url = server.url
        folder = parse_qs(urlsplit(server.url).query)["host"][0]
        self.socket = Path(folder, ".s.PGSQL.5432")

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[psycopg.AsyncConnection[Any]]:
        """Opens a connection in autocommit mode that no fault ends.

        Raises:
            psycopg.OperationalError: Postgres is away.
        """
        connection = await psycopg.AsyncConnection.connect(
            self.url, autocommit=True, application_name=OBSERVER, connect_timeout=5
        )
        try:
            yield connection
        finally:
            await connection.close()

    def stop_at_once(self) -> None:
        """Starts an immediate shutdown: it breaks all connections, and the next start recovers from the log."""
        self._server.process.send_signal(signal.SIGQUIT)

    async def start(self) -> None:
        """Restarts the server, and returns when it accepts clients."""
        await _restart(self._server)
        await self.await_up()

    async def await_up(self) -> None:
        """Waits until the server accepts clients."""
        deadline = asyncio.get_running_loop().time() + _START_LIMIT
        while True:
            try:
                async with asyncio.timeout(5), self.connection():
                    return
            except (psycopg.OperationalError, TimeoutError):
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(_POLL)

    async def ask(self, query: LiteralString) -> list[tuple[Any, ...]]:
        """Returns the rows of a query."""
        async with self.connection() as connection:
            return await (await connection.execute(query)).fetchall()

    async def await_standby(self) -> None:
        """Waits until a standby has caught up and is streaming."""
        async with asyncio.timeout(_START_LIMIT):
            while True:
                if await self.ask("SELECT FROM pg_stat_replication WHERE state = 'streaming'"):
                    return
                await asyncio.sleep(_POLL)

    async def shut_down(self) -> None:
        """Does a fast shutdown: it ends all connections, and a standby gets everything written before."""
        await _shut_down(self._server, signal.SIGINT)

    def suspend(self) -> None:
        """Suspends the whole process tree, the postmaster first, so that no new process is missed."""
        postmaster = psutil.Process(self._server.process.pid)
        postmaster.suspend()
        for child in postmaster.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.suspend()

    def resume(self) -> None:
        """Resumes the process tree, if it was suspended."""
        with suppress(psutil.NoSuchProcess):
            postmaster = psutil.Process(self._server.process.pid)
            for process in (*postmaster.children(recursive=True), postmaster):
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    async def terminate_connections(self) -> int:
        """Ends all connections but our own, and returns their number."""
        return len(await self.ask(f"SELECT pg_terminate_backend(pid) {_CLIENTS}"))

    async def clients(self) -> list[str]:
        """Returns the names of all connections but our own."""
        return sorted(name for (name,) in await self.ask(f"SELECT application_name {_CLIENTS}"))


class Redis:
    """The Redis server, and a direct connection to it."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._server = server
        self.socket = Path(unquote(urlsplit(server.url).path))
        self.client = redis.asyncio.Redis(unix_socket_path=str(self.socket), socket_timeout=5)

    async def close(self) -> None:
        """Closes the connection."""
        await self.client.aclose()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process."""
        with suppress(ProcessLookupError):
            self._server.process.send_signal(number)

    async def start(self) -> None:
        """Restarts the ended server, empty, and returns when it answers."""
        await _restart(self._server)
        await self.await_up()

    async def await_up(self) -> None:
        """Waits until the server answers."""
        deadline = loop_time() + _START_LIMIT
        while True:
            try:
                await self.client.ping()
            except (redis.RedisError, OSError):
                if loop_time() > deadline:
                    raise
                await asyncio.sleep(_POLL)
            else:
                return

    async def follow(self, primary: "Redis") -> None:
        """Becomes a replica of the primary, and returns when it has caught up."""
        port = (await primary.client.config_get("port"))["port"]
        await self.client.replicaof("127.0.0.1", port)
        async with asyncio.timeout(_START_LIMIT):
            while True:
                if (await self.client.info("replication")).get("master_link_status") == "up":
                    return
                await asyncio.sleep(_POLL)

    async def clients(self) -> list[str]:
        """Returns the names of all named connections."""
        return sorted(filter(None, [one["name"] for one in await self.client.client_list()]))

    async def shut_down(self) -> None:
        """Ends the server by SIGTERM, and waits for its exit."""
        await _shut_down(self._server, signal.SIGTERM)

    async def copy(self) -> dict[bytes, tuple[int, bytes]]:
        """Returns all keys with their remaining time to live (ms; 0 for none) and their value as `DUMP` returns it."""
        keys = [key async for key in self.client.scan_iter(count=1000)]
        async with self.client.pipeline(transaction=True) as pipeline:
            for key in keys:
                pipeline.pttl(key)
                pipeline.dump(key)
            replies = await pipeline.execute()
        return {
            key: (max(left, 0), value)
            for key, left, value in zip(keys, replies[::2], replies[1::2], strict=True)
            if value is not None
        }

    async def become(self, copied: dict[bytes, tuple[int, bytes]]) -> None:
        """Replaces all keys with an earlier copy, in one transaction."""
        async with self.client.pipeline(transaction=True) as pipeline:
            pipeline.flushall()
            for key, (left, value) in copied.items():
                pipeline.restore(key, left, value)
            await pipeline.execute()


def loop_time() -> float:
    """Returns the time of the running event loop in seconds."""
    return asyncio.get_running_loop().time()


class ServerStarter:
    """Starts servers during a run. All of them end with the run, even one that is just starting."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._starter = ThreadPoolExecutor(1)

    async def start(self, server: AbstractContextManager[EmbeddedServer]) -> EmbeddedServer:
        """Starts a server in a thread, to block nothing else, and returns when it answers."""
        return await asyncio.get_running_loop().run_in_executor(self._starter, self._opened.enter_context, server)

    def close(self) -> None:
        """Ends all servers."""
        self._starter.shutdown()
        self._opened.close()


async def _restart(server: EmbeddedServer) -> None:
    await _await_end(server)
    server.restart()


async def _shut_down(server: EmbeddedServer, number: signal.Signals) -> None:
    server.process.send_signal(number)
    await _await_end(server)


async def _await_end(server: EmbeddedServer) -> None:
    await asyncio.get_running_loop().run_in_executor(None, server.process.wait, 30)
