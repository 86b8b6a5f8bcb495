"""A TCP proxy that can cut connections, silence them, tear them in the middle of a message, and refuse."""

import asyncio
import contextlib
import socket
import struct
import time
from pathlib import Path

from tests.chaos.evidence import Cut
from tests.chaos.ports import free_port

_CHUNK = 65_536


class Proxy:
    """Listens on a port of its own and passes bytes on to a server."""

    def __init__(self, name: str, upstream: Path | int) -> None:
        """Does not listen yet.

        Args:
            name: what it stands in front of.
            upstream: the server's Unix socket, or its port on this machine.
        """
        self.name = name
        self.port = free_port()
        self.cuts: list[Cut] = []
        self.resets = False
        """Whether it takes further connections and resets them at once."""
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()

    async def open(self) -> None:
        """Begins, or begins again, to take connections."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    @property
    def takes_connections(self) -> bool:
        """Whether further connections are served."""
        return self._server is not None and not self.resets

    def lead_to(self, upstream: Path | int) -> None:
        """Passes further connections on to another server; those that there are stay where they are."""
        self._upstream = upstream

    def refuse(self) -> None:
        """Stops listening: further connections are refused by the system."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def close(self) -> None:
        """Stops listening and cuts what there is."""
        self.refuse()
        self.cut()

    def cut(self) -> int:
        """Resets all connections and returns how many there were."""
        connections = list(self._connections)
        for connection in connections:
            self._cut(connection)
        return len(connections)

    def tear(self) -> int:
        """Makes each connection pass on half of its next chunk, whichever way that goes, and then resets it."""
        for connection in self._connections:
            connection.is_torn = True
        return len(self._connections)

    def silence(self) -> int:
        """Passes on nothing more of the connections that there are, until they are cut; further ones are served."""
        for connection in self._connections:
            connection.passes.clear()
        return len(self._connections)

    def cut_silenced(self) -> None:
        """Resets the connections that were silenced: their host never comes back."""
        for connection in [one for one in self._connections if not one.passes.is_set()]:
            self._cut(connection)

    def mend(self) -> None:
        """Lets connections be that were to be torn and have been silent since."""
        for connection in self._connections:
            connection.is_torn = False

    def _cut(self, connection: "_Connection") -> None:
        self.cuts.append(Cut(connection.port, time.time()))
        connection.reset()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.resets:
            _reset(writer)
            return
        try:
            if isinstance(self._upstream, Path):
                upstream = await asyncio.open_unix_connection(self._upstream)
            else:
                upstream = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            _reset(writer)
            return
        connection = _Connection((reader, writer), upstream)
        self._connections.add(connection)
        try:
            if await connection.run():
                self._cut(connection)
        except asyncio.CancelledError:
            return  # the end of the run; asyncio's streams would make a noise of it
        finally:
            self._connections.discard(connection)
            connection.close()


class _Connection:
    def __init__(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self.is_torn = False
        self.passes = asyncio.Event()
        """Whether it passes anything on."""
        self.passes.set()
        self._client, self._server = client, server
        name = server[1].get_extra_info("sockname")
        self.port: int = name[1] if isinstance(name, tuple) else 0
        """The port under which the server knows it."""

    async def run(self) -> bool:
        """Passes bytes on both ways until one side hangs up; returns whether it is to be reset."""
        pumps = [
            asyncio.ensure_future(self._pump(self._client[0], self._server[1])),
            asyncio.ensure_future(self._pump(self._server[0], self._client[1])),
        ]
        try:
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
        return any(pump.result() for pump in done)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self.passes.wait()
                if self.is_torn:
                    writer.write(data[: len(data) // 2])
                    return True
                writer.write(data)
                await writer.drain()
        return False

    def reset(self) -> None:
        self.passes.set()
        _reset(self._client[1])
        _reset(self._server[1])

    def close(self) -> None:
        self._client[1].close()
        self._server[1].close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection with RST, where it is one of TCP."""
    linger = struct.pack("ii", 1, 0)
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
