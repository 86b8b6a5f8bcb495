"""A relay in a thread of the test, and what it leaves in Postgres, Redis and the log."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import psycopg
import redis

from outbox.runtime.settings import RelaySettings
from outbox.runtime.stop import Stop
from outbox_relay.loop import Relay
from tests.support.rows import add_row

Connection = psycopg.Connection[dict[str, Any]]


@contextmanager
def running(settings: RelaySettings) -> Iterator[Thread]:
    """Runs a relay in a thread. It must still run at the end, and stop when requested."""
    stop = Stop()
    thread = Thread(target=Relay(settings, stop).run, name="relay", daemon=True)
    thread.start()
    try:
        yield thread
        assert thread.is_alive()
    finally:
        stop.request()
        thread.join(10)
    assert not thread.is_alive()


def add_pending(connection: Connection, queue: str = "default", delay: float = 0) -> int:
    """Adds a pending row that is due in `delay` seconds, and returns its id."""
    return add_row(connection, queue=queue, status="pending", delivery=0, delay=delay).row_id


def status_of(connection: Connection, row: int) -> str:
    """Returns the status of the row with this id."""
    found = connection.execute("SELECT status FROM outbox WHERE id = %s", [row]).fetchone()
    assert found is not None
    return str(found["status"])


def queued(client: redis.Redis, queue: str = "default") -> list[Any]:
    """Returns the job ids in a queue."""
    return client.lrange(f"rq:queue:{queue}", 0, -1)


def events_in(lines: list[Any], *events: str) -> list[str]:
    """Returns those of the events that were logged, in order."""
    return [line["event"] for line in lines if line["event"] in events]


def changed(settings: RelaySettings, **changes: Any) -> RelaySettings:
    """Returns the settings with these fields changed."""
    return settings.model_copy(update=changes)
