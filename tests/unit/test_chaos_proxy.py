"""The chaos run's proxy moves the address of a server, as a fail-over requires."""

import asyncio
from pathlib import Path

from tests.chaos.proxy import Proxy


def test_an_address_that_moves(tmp_path: Path) -> None:
    """New connections reach the new server, and an open one stays at the old server."""
    served: list[asyncio.Task[None] | None] = []

    async def serve(name: str) -> asyncio.Server:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            served.append(asyncio.current_task())
            while await reader.readline():
                writer.write(name.encode() + b"\n")
            writer.close()
            await writer.wait_closed()

        return await asyncio.start_unix_server(answer, tmp_path / name)

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"who are you?\n")
        return (await reader.readline()).strip()

    async def act() -> list[bytes]:
        async with await serve("old"), await serve("new"):
            proxy = Proxy("server", tmp_path / "old")
            await proxy.open()
            before = await asyncio.open_connection("127.0.0.1", proxy.port)
            answers = [await ask(*before)]
            proxy.set_upstream(tmp_path / "new")
            after = await asyncio.open_connection("127.0.0.1", proxy.port)
            answers += [await ask(*before), await ask(*after)]
            for _, writer in (before, after):
                writer.close()
            await asyncio.gather(*filter(None, served))
            proxy.close()
        return answers

    assert asyncio.run(act()) == [b"old", b"old", b"new"]
