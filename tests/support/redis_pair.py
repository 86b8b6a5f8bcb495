"""Runs a Redis primary and replica behind one address, which a fail-over moves to the new primary."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import redis

from outbox.devstack.embedded import EmbeddedServer, embedded_redis
from outbox.runtime import redis_connection
from tests.support.mailbox import free_port
from tests.support.waiting import eventually


def replicating(port: int) -> list[str]:
    """Returns the settings of a primary or a replica that other servers reach at a port."""
    return ["bind 127.0.0.1", f"port {port}", "repl-diskless-sync yes", "repl-diskless-sync-delay 0"]


class RedisPair:
    """Two servers. A fail-over closes no socket: clients of the old primary stay connected to it."""

    def __init__(
        self, folder: Path, servers: list[EmbeddedServer], ports: list[int], clients: list[redis.Redis]
    ) -> None:
        self.url = f"unix://{quote(str(folder / 'primary.sock'))}"
        """The URL of the address: new connections reach the server it points to, as with a DNS name."""
        self._address = folder / "primary.sock"
        self._sockets = [Path(unquote(urlsplit(server.url).path)) for server in servers]
        self._ports = ports
        self._clients = clients
        self._primary = 0
        self.replicate()
        self.move_address()

    @property
    def primary(self) -> redis.Redis:
        """A client of the primary."""
        return self._clients[self._primary]

    @property
    def other(self) -> redis.Redis:
        """A client of the other server."""
        return self._clients[1 - self._primary]

    def fail_over(self) -> None:
        """Promotes the replica, moves the address, and makes the old primary its replica."""
        self.promote()
        self.move_address()
        self.replicate()

    def promote(self) -> None:
        """Makes the other server the primary; the old one still accepts writes."""
        self._primary = 1 - self._primary
        self.primary.replicaof("NO", "ONE")

    def replicate(self) -> None:
        """Makes the other server a replica, and waits until it has caught up."""
        self.other.replicaof("127.0.0.1", self._ports[self._primary])
        eventually(lambda: self.other.info("replication").get("master_link_status") == "up", 15, "it replicates")

    def move_address(self) -> None:
        """Makes the address point to the primary, for new connections."""
        new = self._address.with_suffix(".new")
        new.symlink_to(self._sockets[self._primary])
        new.replace(self._address)


@contextmanager
def redis_pair(folder: Path) -> Iterator[RedisPair]:
    """Runs both servers until the end of the block."""
    ports = [free_port(), free_port()]
    with ExitStack() as opened:
        servers = [
            opened.enter_context(embedded_redis(folder / name, settings=replicating(port)))
            for name, port in zip(("one", "two"), ports, strict=True)
        ]
        clients = [opened.enter_context(redis_connection.connect(server.url, "test")) for server in servers]
        yield RedisPair(folder, servers, ports, clients)
