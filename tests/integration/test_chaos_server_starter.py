"""No server that is started during a chaos run outlives it."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outbox.devstack.embedded import EmbeddedServer, embedded_redis
from tests.chaos.servers import ServerStarter


def test_a_run_that_ends_while_a_server_starts(tmp_path: Path) -> None:
    """A server that is still starting when the run ends is ended too."""
    started: list[EmbeddedServer] = []
    begun, may_start = threading.Event(), threading.Event()

    @contextmanager
    def slow() -> Iterator[EmbeddedServer]:
        begun.set()
        assert may_start.wait(10)
        with embedded_redis(tmp_path) as server:
            started.append(server)
            yield server

    async def run() -> None:
        server_starter = ServerStarter()
        starting = asyncio.create_task(server_starter.start(slow()))
        assert await asyncio.to_thread(begun.wait, 10)
        starting.cancel()
        await asyncio.wait([starting])
        may_start.set()
        server_starter.close()

    asyncio.run(run())

    (server,) = started
    assert server.process.poll() is not None
