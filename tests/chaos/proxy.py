"""A TCP proxy that can cut, silence and refuse connections, and tear them in the middle of a message."""

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
    """Listens on a port and forwards bytes to a server."""

    def __init__(self, name: str, upstream: Path | int) -> None:
        """Does not listen yet.

        Args:
            name: the name of the server behind it.
            upstream: the server's Unix socket, or its port on this machine.
        """
        self.name = name
        self.port = free_port()
        self.cuts: list[Cut] = []
        self.resets_connections = False
        """Whether it resets new connections immediately."""
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()

    async def open(self) -> None:
        """Starts to listen, unless it already does."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    @property
    def is_accepting(self) -> bool:
        """Whether new connections are served."""
        return self._server is not None and not self.resets_connections

    def set_upstream(self, upstream: Path | int) -> None:
        """Forwards new connections to another server; open ones stay where they are."""
        self._upstream = upstream

    def refuse(self) -> None:
        """Stops listening: the system refuses new connections."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def close(self) -> None:
        """Stops listening and cuts all connections."""
        self.refuse()
        self.cut()

    def cut(self) -> int:
        """Resets all connections and returns how many there were."""
        connections = list(self._connections)
        for connection in connections:
            self._cut(connection)
        return len(connections)

    def tear(self) -> int:
        """Makes each connection forward half of its next chunk, in either direction, and then resets it."""
        for connection in self._connections:
            connection.is_torn = True
        return len(self._connections)

    def silence(self) -> int:
        """Forwards nothing more on the open connections, until they are cut; new ones are served."""
        for connection in self._connections:
            connection.may_forward.clear()
        return len(self._connections)

    def cut_silenced(self) -> None:
        """Resets the silenced connections: their host never comes back."""
        for connection in [one for one in self._connections if not one.may_forward.is_set()]:
            self._cut(connection)

    def cancel_tears(self) -> None:
        """Spares the connections that were to be torn and have been idle since."""
        for connection in self._connections:
            connection.is_torn = False

    def _cut(self, connection: "_Connection") -> None:
        self.cuts.append(Cut(connection.port, time.time()))
        connection.reset()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.resets_connections:
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
            return  # the end of the run; asyncio's streams would log it
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
        self.may_forward = asyncio.Event()
        """Cleared while it is silenced."""
        self.may_forward.set()
        self._client, self._server = client, server
        name = server[1].get_extra_info("sockname")
        self.port: int = name[1] if isinstance(name, tuple) else 0
        """The client port that the server sees."""

    async def run(self) -> bool:
        """Forwards bytes in both directions until one side disconnects; returns whether to reset the connection."""
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
                await self.may_forward.wait()
                if self.is_torn:
                    writer.write(data[: len(data) // 2])
                    return True
                writer.write(data)
                await writer.drain()
        return False

    def reset(self) -> None:
        self.may_forward.set()
        _reset(self._client[1])
        _reset(self._server[1])

    def close(self) -> None:
        self._client[1].close()
        self._server[1].close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection; a TCP connection with RST."""
    linger = struct.pack("ii", 1, 0)
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
