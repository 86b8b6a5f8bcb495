"""Connections to Redis, and checks of its URL and server."""

from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import DefaultParser
from redis.retry import Retry

from outbox.errors import SettingsError, UnsupportedRedisError

AWAY = (redis.RedisError, OSError)
"""What redis-py raises when Redis is away, loading, read-only or out of memory: all the same to us."""

OLDEST = (6, 2)

BLOCK = 1.0
"""Seconds that a blocking command may block: also how long a signal may wait to be seen."""

LIFETIME = 60.0
"""Seconds after which a process connects anew even if nothing has failed: the address may lead to another server now,
while the old one still answers on open connections."""


LONGEST_ELEMENT = 16_000_000
"""Upper bound of bytes of one element of a reply: an id has 30 at most, and Redis allows 512 MB."""


class TooLongError(redis.InvalidResponse):
    """A foreign client has written an element that is longer than `LONGEST_ELEMENT`, and the rest of it is unread."""


class _Parser(DefaultParser):  # type: ignore[misc, valid-type]  # redis-py chooses it by what is installed
    """Reads replies as redis-py does, and refuses elements over `LONGEST_ELEMENT`."""

    def read_from_socket(self, *args: Any, **kwargs: Any) -> bool:
        """Reads what has arrived.

        Raises:
            TooLongError: what has arrived of one element is too long; redis-py closes the connection.
        """
        has_read: bool = super().read_from_socket(*args, **kwargs)
        if self._reader is not None and self._reader.len() > LONGEST_ELEMENT:
            raise TooLongError(f"Redis holds an element of over {LONGEST_ELEMENT} bytes, which a foreign client wrote")
        return has_read


def connect(redis_url: str, name: str) -> redis.Redis:
    """Makes a client; it connects at the first command.

    One immediate retry, for connections that went stale while they were idle. What a retry does twice, the fence
    makes harmless.

    Args:
        redis_url: where to.
        name: shown by `CLIENT LIST`.
    """
    return redis.Redis.from_url(
        redis_url,
        client_name=name,
        socket_connect_timeout=5,
        socket_timeout=BLOCK + 4,
        health_check_interval=15,
        retry=Retry(NoBackoff(), 1),
        protocol=2,
        parser_class=_Parser,
    )


def check_url(redis_url: str) -> None:
    """Checks the options of a URL that `settings` accepted, without connecting.

    The settings do not do this, because the service reads them without importing redis-py.

    Raises:
        SettingsError: redis-py refuses an option, or a file that an option names cannot be read.
    """
    try:
        with connect(redis_url, "outbox") as client:
            connection: Any = client.connection_pool.make_connection()
    except (ValueError, TypeError, redis.RedisError) as error:
        reason = str(error).partition(": ")[0]  # the rest may quote the option's value
        raise SettingsError(f"REDIS_URL is wrong: it has an option that redis-py refuses: {reason}") from None
    for option, attribute in (("ssl_ca_certs", "ca_certs"), ("ssl_certfile", "certfile"), ("ssl_keyfile", "keyfile")):
        if name := getattr(connection, attribute, None):
            try:
                Path(name).open("rb").close()
            except (OSError, ValueError) as error:
                raise SettingsError(
                    f"REDIS_URL is wrong: it has an option {option} with a file that cannot be read:"
                    f" {getattr(error, 'strerror', None) or error}"
                ) from None


def drop_connections(client: redis.Redis) -> None:
    """Makes the next command connect anew: at every outage, whatever the error was, and at the end of a lifetime.

    After a fail-over the old primary may keep its connections and refuse to write, and redis-py keeps a connection that
    has had an error for an answer. A connection that another thread uses at this moment, as to hear messages, is left
    to that thread.
    """
    client.connection_pool.disconnect(inuse_connections=False)


def check_supported(client: redis.Redis) -> None:
    """Checks the server's version and kind.

    Raises:
        UnsupportedRedisError: it is older than 6.2, or a cluster.
        redis.RedisError: it is away.
    """
    info = client.info()
    mode = info.get("redis_mode") or info.get("server_mode", "standalone")  # Redis' word, and Valkey's
    check_server(str(info.get("redis_version", "0")), str(mode))


def check_server(version: str, mode: str) -> None:
    """Checks the answer of a server to INFO.

    Args:
        version: `redis_version`.
        mode: `redis_mode`: `standalone`, `cluster` or `sentinel`.

    Raises:
        UnsupportedRedisError: it is older than 6.2, or no single server.
    """
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < OLDEST:
        raise UnsupportedRedisError(f"Redis {version} is too old: REDIS_URL must name one of version 6.2 or newer")
    if mode != "standalone":
        raise UnsupportedRedisError(f"REDIS_URL names a Redis {mode}: RQ needs a single server, so name one of those")
