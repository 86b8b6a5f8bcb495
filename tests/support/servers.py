"""Provides the Postgres and Redis of a test run: given servers, containers, or embedded servers, in this order."""

import gc
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote

import docker
import docker.errors

from outbox.devstack.embedded import embedded_postgres, embedded_redis
from tests.support.mailbox import free_port

POSTGRES_IMAGE = os.environ.get("TEST_POSTGRES_IMAGE", "postgres:18-alpine")
REDIS_IMAGE = os.environ.get("TEST_REDIS_IMAGE", "redis:8-alpine")


@dataclass(frozen=True)
class Choice:
    """The origin of a server."""

    kind: str
    """`given`, `container` or `embedded`."""
    description: str


@cache
def choice_of(variable: str, image: str, embedded: str) -> Choice:
    """Chooses the origin of a server; a Docker engine that cannot get the image counts as none."""
    if os.environ.get(variable):
        return Choice("given", f"given by {variable}")
    if _engine_has(image):
        return Choice("container", f"container {image}")
    if os.environ.get("TEST_REQUIRE_CONTAINERS"):
        raise RuntimeError(f"no Docker engine has the image {image}, and TEST_REQUIRE_CONTAINERS is set")
    return Choice("embedded", f"embedded {embedded}")


def postgres_choice() -> Choice:
    """Returns the origin of this run's Postgres."""
    return choice_of("TEST_DATABASE_URL", POSTGRES_IMAGE, "PostgreSQL")


def redis_choice() -> Choice:
    """Returns the origin of this run's Redis."""
    return choice_of("TEST_REDIS_URL", REDIS_IMAGE, "Redis")


@contextmanager
def postgres_server(folder: Path) -> Iterator[str]:
    """Runs Postgres, unless one is given, and yields the URL of a database from which others can be created."""
    kind = postgres_choice().kind
    if kind == "given":
        yield os.environ["TEST_DATABASE_URL"]
    elif kind == "container":
        from testcontainers.community.postgres import PostgresContainer  # slow to import

        with PostgresContainer(POSTGRES_IMAGE, username="outbox", password="outbox", dbname="outbox") as container:
            yield container.get_connection_url(driver=None)
    else:
        settings = ["fsync=off", "full_page_writes=off", "max_connections=200", "autovacuum=off"]
        with embedded_postgres(folder, settings=settings) as server:
            yield server.url
            server.process.send_signal(signal.SIGQUIT)  # a fast shutdown would first write 300 databases to disk


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Runs Redis, unless one is given, and yields its URL."""
    kind = redis_choice().kind
    if kind == "given":
        yield _database_of_this_process(os.environ["TEST_REDIS_URL"])
    elif kind == "container":
        from testcontainers.community.redis import RedisContainer

        with RedisContainer(REDIS_IMAGE) as container:
            yield f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}/0"
    else:
        with embedded_redis(folder) as server:
            yield server.url


def _database_of_this_process(redis_url: str) -> str:
    """Returns the URL of the database that this test process (of several with `pytest -n`) may empty."""
    process = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    if redis_url.startswith("unix://"):
        return f"{redis_url.partition('?')[0]}?db={process}"
    return with_database(redis_url, process)


def _engine_has(image: str) -> bool:
    with warnings.catch_warnings():
        # If no engine answers, the client does not close its socket.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            with closing(docker.from_env(timeout=30)) as engine:
                _pull_if_missing(engine, image)
            has_image = True
        except (docker.errors.DockerException, OSError):
            has_image = False
        gc.collect()
    return has_image


def _pull_if_missing(engine: docker.DockerClient, image: str) -> None:
    try:
        engine.images.get(image)
    except docker.errors.ImageNotFound:
        engine.images.pull(image)


def cluster_settings() -> list[str]:
    """Returns the settings of a Redis in cluster mode, on ports that no other test uses at the same time."""
    while (port := free_port()) > 50_000:
        pass
    return ["cluster-enabled yes", "bind 127.0.0.1", f"port {port}"]  # the cluster bus uses port + 10,000


def with_database(url: str, name: str) -> str:
    """Returns the URL with another database name."""
    head, _, query = url.partition("?")
    server, _, _ = head.rpartition("/")
    return f"{server}/{quote(name)}" + (f"?{query}" if query else "")
