"""Outages of Redis, and answers of Redis that count as one: no connection survives them."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import redis
from structlog.testing import capture_logs

from outbox.devstack.embedded import EmbeddedServer
from outbox.runtime import redis_connection
from outbox.runtime.settings import RelaySettings, WorkerSettings
from outbox.runtime.stop import Stop
from outbox_relay import loop
from outbox_relay.duty import Duty
from outbox_relay.loop import Relay
from outbox_worker.worker import Worker
from tests.conftest import Connection, short_folder
from tests.support.mailbox import free_port
from tests.support.redis_pair import redis_pair
from tests.support.waiting import eventually


def _read_only(client: redis.Redis) -> None:
    client.replicaof("127.0.0.1", free_port())


def _master_down(client: redis.Redis) -> None:
    client.config_set("replica-serve-stale-data", "no")
    client.replicaof("127.0.0.1", free_port())


def _few_replicas(client: redis.Redis) -> None:
    client.config_set("min-replicas-to-write", 1)


def _out_of_memory(client: redis.Redis) -> None:
    client.config_set("maxmemory", 1)


def _cannot_save(client: redis.Redis) -> None:
    settings = client.config_get("dir") | client.config_get("dbfilename")
    # A file cannot replace a folder that is not empty.
    (Path(str(settings["dir"])) / str(settings["dbfilename"]) / "in the way").mkdir(parents=True)
    client.config_set("save", "3600 1")
    client.bgsave()
    eventually(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", 10, "it cannot save")


STATES = {
    "READONLY": _read_only,
    "MASTERDOWN": _master_down,
    "NOREPLICAS": _few_replicas,
    "OOM": _out_of_memory,
    "MISCONF": _cannot_save,
}


@pytest.fixture
def redis_url(own_redis: EmbeddedServer) -> str:
    """The URL of the test's own server, in all settings."""
    return own_redis.url


@pytest.fixture
def own_client(own_redis: EmbeddedServer) -> Iterator[redis.Redis]:
    """A client of the test's own server."""
    with redis_connection.connect(own_redis.url, "test") as client:
        yield client
        client.config_set("save", "")  # else the server refuses to shut down


def connections(client: redis.Redis, name: str) -> set[str]:
    """Returns the ids of the connections with this client name."""
    return {entry["id"] for entry in client.client_list() if entry["name"] == name}


@pytest.mark.parametrize("refusal", STATES)
def test_a_relay_drops_its_connections(
    refusal: str,
    relay_settings: RelaySettings,
    own_client: redis.Redis,
    connection: Connection,
) -> None:
    """After a fail-over, an old connection would lead to the wrong server."""
    relay = Relay(relay_settings, Stop())
    repairing = Duty("repair", relay._repair, 10.0, needs_redis=True)
    with capture_logs() as lines:
        relay._do(repairing, connection)
        before = connections(own_client, "outbox-relay")
        assert before
        STATES[refusal](own_client)
        relay._do(repairing, connection)
        assert [line["event"] for line in lines] == ["Redis is away"]
    eventually(lambda: not before & connections(own_client, "outbox-relay"), 5, "the old ones are closed")
    relay._client.close()


@pytest.fixture
def worker(worker_settings: WorkerSettings) -> Iterator[Worker]:
    """A worker whose loop does not run: the test makes it take jobs."""
    worker = Worker(worker_settings, {}, Stop())
    worker._completer.start()
    eventually(lambda: worker._completer.is_healthy(1), 10, "its completer works")
    yield worker
    worker._completer.close(5)
    worker._registration.close()


@pytest.mark.parametrize("refusal", STATES)
def test_a_worker_drops_its_connections(refusal: str, worker: Worker, own_client: redis.Redis) -> None:
    """Also the one that listens for RQ's commands. It opens both again once Redis can serve."""
    worker._take()
    before = connections(own_client, "outbox-worker")
    assert len(before) == 2
    STATES[refusal](own_client)
    worker._registration._beat_at = 0.0  # the heartbeat is due: in some states an idle worker may still wait for jobs
    worker._take()
    eventually(lambda: not before & connections(own_client, "outbox-worker"), 5, "the old ones are closed")

    own_client.replicaof("NO", "ONE")
    own_client.config_set("min-replicas-to-write", 0)
    own_client.config_set("maxmemory", 0)
    own_client.config_set("stop-writes-on-bgsave-error", "no")

    def is_back() -> bool:
        worker._take()
        return len(connections(own_client, "outbox-worker")) == 2

    eventually(is_back, 10, "it is back, and listens for commands")


def test_no_connection_outlives_its_lifetime(
    relay_settings: RelaySettings,
    worker_settings: WorkerSettings,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The address has moved, and the old server still serves its connections: the processes still leave it."""
    monkeypatch.setattr(redis_connection, "LIFETIME", 0.5)
    monkeypatch.setattr(loop, "REPAIR_INTERVAL", 0.05)  # the relay uses its connection all the time
    with short_folder() as folder, redis_pair(folder) as pair:
        stop = Stop()
        relay = Relay(relay_settings.model_copy(update={"redis_url": pair.url}), stop)
        worker = Worker(worker_settings.model_copy(update={"redis_url": pair.url}), {}, Stop())
        running = [Thread(target=relay.run), Thread(target=worker._work)]
        for thread in running:
            thread.start()
        try:
            for name in ("outbox-relay", "outbox-worker"):
                eventually(lambda name=name: connections(pair.primary, name), 10, name)  # type: ignore[misc]
            pair.promote()
            pair.move_address()
            for name in ("outbox-relay", "outbox-worker"):
                eventually(lambda name=name: not connections(pair.other, name), 10, f"{name} has left")  # type: ignore[misc]
            eventually(lambda: len(connections(pair.primary, "outbox-worker")) > 1, 10, "it listens for commands there")
        finally:
            stop.request()
            worker._stop.request()
            for thread in running:
                thread.join(10)
            worker._finish()
