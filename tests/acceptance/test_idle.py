"""The three processes use few resources when there is nothing to do."""

import time
from collections import Counter
from threading import Thread

import psutil
import pytest
import redis

from outbox.devstack.embedded import EmbeddedServer
from outbox.runtime import postgres, redis_connection
from tests.support.mailbox import Mailbox
from tests.support.processes import Stack
from tests.support.waiting import eventually

pytestmark = pytest.mark.unmeasured

SECONDS = 6.0
"""Seconds of the measurement."""


def test_idle_processes_use_almost_nothing(
    stack: Stack, own_postgres: EmbeddedServer, own_redis: EmbeddedServer, mailbox: Mailbox
) -> None:
    """At most 2 statements and 5 Redis commands per second in all; at most 1 % of a core and 80 MB each."""
    with postgres.connect(own_postgres.url, "test") as connection:
        connection.execute("ALTER DATABASE outbox SET log_statement = 'all'")
        connection.execute("ALTER SYSTEM SET log_line_prefix = '%a|'")
        connection.execute("SELECT pg_reload_conf()")
    stack.environment |= {"DATABASE_URL": own_postgres.url, "REDIS_URL": own_redis.url}
    processes = stack.run_all("service", "relay", "worker")
    assert stack.create_user("alice")[0] == 201
    eventually(lambda: mailbox.to("alice@example.com"), 10, "the mail")
    idle_at = time.monotonic() + 3
    eventually(lambda: time.monotonic() > idle_at, 5, "they are idle")

    used = [psutil.Process(process.popen.pid) for process in processes]
    with redis_connection.connect(own_redis.url, "test") as client:
        commands = _Commands(client)
        log_size, busy = own_postgres.log.stat().st_size, [sum(process.cpu_times()[:2]) for process in used]
        watched_until = time.monotonic() + SECONDS
        eventually(lambda: time.monotonic() > watched_until, SECONDS + 5, "the measurement is over")
        statements = _statements(own_postgres.log.read_bytes()[log_size:].decode())
        received = commands.stop()

    assert statements, "the log shows them"
    assert statements.total() <= 2 * SECONDS, statements
    assert received, "the monitor shows them"
    assert received.total() <= 5 * SECONDS, received
    for process, before in zip(used, busy, strict=True):
        assert sum(process.cpu_times()[:2]) - before <= 0.01 * SECONDS, process
        assert process.memory_info().rss <= 80_000_000, process


def _statements(log: str) -> Counter[str]:
    """Counts the statements in Postgres' log by process; those with parameters or prepared are logged as 'execute'."""
    lines = (line for line in log.splitlines() if "|LOG:  statement: " in line or "|LOG:  execute " in line)
    return Counter(line.partition("|")[0] for line in lines)


class _Commands:
    """Counts the commands that clients send to Redis, without those that scripts call."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._seen: Counter[str] = Counter()
        self._monitor = client.monitor().__enter__()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        for command in self._monitor.listen():
            if command["command"].startswith("ECHO"):
                return
            if command["client_type"] != "lua":
                self._seen[command["command"].partition(" ")[0]] += 1

    def stop(self) -> Counter[str]:
        """Stops counting, and returns the number of each command."""
        self._client.echo("end")
        self._thread.join(5)
        self._monitor.__exit__(None, None, None)
        return self._seen
