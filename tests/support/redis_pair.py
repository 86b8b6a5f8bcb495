"""A primary and a replica of Redis behind one address, which moves from the old primary to the new one."""

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
    """Returns the settings of a server that is to be a primary or a replica, and is reached by others at a port."""
    return ["bind 127.0.0.1", f"port {port}", "repl-diskless-sync yes", "repl-diskless-sync-delay 0"]


class RedisPair:
    """Two servers. What is connected to the old primary stays connected to it: no socket is closed by a fail-over."""

    def __init__(
        self, folder: Path, servers: list[EmbeddedServer], ports: list[int], clients: list[redis.Redis]
    ) -> None:
        self.url = f"unix://{quote(str(folder / 'primary.sock'))}"
        """Leads to the primary at the time of the connect, as a DNS name or a Kubernetes service does."""
        self._address = folder / "primary.sock"
        self._sockets = [Path(unquote(urlsplit(server.url).path)) for server in servers]
        self._ports = ports
        self._clients = clients
        self._primary = 0
        self.replicate()
        self.move_address()

    @property
    def primary(self) -> redis.Redis:
        """A client of the server that takes writes."""
        return self._clients[self._primary]

    @property
    def other(self) -> redis.Redis:
        """A client of the other one."""
        return self._clients[1 - self._primary]

    def fail_over(self) -> None:
        """Promotes the replica, moves the address, and makes the old primary its replica."""
        self.promote()
        self.move_address()
        self.replicate()

    def promote(self) -> None:
        """Makes the other one the primary; the old one still takes writes."""
        self._primary = 1 - self._primary
        self.primary.replicaof("NO", "ONE")

    def replicate(self) -> None:
        """Makes the other one a replica, and waits until it has all that the primary has."""
        self.other.replicaof("127.0.0.1", self._ports[self._primary])
        eventually(lambda: self.other.info("replication").get("master_link_status") == "up", 15, "it replicates")

    def move_address(self) -> None:
        """Makes the address lead to the primary, for who connects from now on."""
        new = self._address.with_suffix(".new")
        new.symlink_to(self._sockets[self._primary])
        new.replace(self._address)


@contextmanager
def redis_pair(folder: Path) -> Iterator[RedisPair]:
    """Runs both until the block is left."""
    ports = [free_port(), free_port()]
    with ExitStack() as opened:
        servers = [
            opened.enter_context(embedded_redis(folder / name, settings=replicating(port)))
            for name, port in zip(("one", "two"), ports, strict=True)
        ]
        clients = [opened.enter_context(redis_connection.connect(server.url, "test")) for server in servers]
        yield RedisPair(folder, servers, ports, clients)
