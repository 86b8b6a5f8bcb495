"""Connections to Redis, and checks of its URL and server."""

from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import DefaultParser
from redis.retry import Retry

from outbox.errors import SettingsError, UnsupportedRedisError

AWAY = (redis.RedisError, OSError)
"""Errors of redis-py when Redis is away, loading, read-only or out of memory, which all count as an outage."""

OLDEST = (6, 2)

BLOCK = 1.0
"""Seconds that a blocking command may block, and so the delay until a signal is noticed."""

LIFETIME = 60.0
"""Seconds after which a process reconnects even if nothing has failed: the address may lead to another server by now,
while the old one still answers on open connections."""


LONGEST_ELEMENT = 16_000_000
"""Upper bound of bytes of one element of a reply: an id has at most 30, and Redis allows 512 MB."""


class TooLongError(redis.InvalidResponse):
    """A foreign client wrote an element longer than `LONGEST_ELEMENT`, whose rest is unread."""


class _Parser(DefaultParser):  # type: ignore[misc, valid-type]  # redis-py chooses its base at import
    """redis-py's parser, which also refuses elements over `LONGEST_ELEMENT`."""

    def read_from_socket(self, *args: Any, **kwargs: Any) -> bool:
        """Reads the bytes that have arrived.

        Raises:
            TooLongError: the unparsed bytes are too many; redis-py closes the connection.
        """
        has_read: bool = super().read_from_socket(*args, **kwargs)
        if self._reader is not None and self._reader.len() > LONGEST_ELEMENT:
            raise TooLongError(f"Redis holds an element of over {LONGEST_ELEMENT} bytes, which a foreign client wrote")
        return has_read


def connect(redis_url: str, name: str) -> redis.Redis:
    """Returns a client, which connects at the first command.

    It retries once, immediately, because an idle connection may have gone stale. The fence makes a command that runs
    twice harmless.

    Args:
        redis_url: the Redis database.
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
    """Makes the next command reconnect: called after every outage, whatever the error was, and after `LIFETIME`.

    After a fail-over the old primary may keep its connections and refuse to write, and redis-py keeps a connection on
    which the server answered with an error. A connection that another thread is using, to listen for example, stays
    open.
    """
    client.connection_pool.disconnect(inuse_connections=False)


def check_supported(client: redis.Redis) -> None:
    """Checks the server's version and kind.

    Raises:
        UnsupportedRedisError: it is older than 6.2, or a cluster.
        redis.RedisError: it is away.
    """
    info = client.info()
    mode = info.get("redis_mode") or info.get("server_mode", "standalone")  # the names in Redis and in Valkey
    check_server(str(info.get("redis_version", "0")), str(mode))


def check_server(version: str, mode: str) -> None:
    """Checks fields of a server's answer to INFO.

    Args:
        version: `redis_version`.
        mode: `redis_mode`: `standalone`, `cluster` or `sentinel`.

    Raises:
        UnsupportedRedisError: it is older than 6.2, or not a single server.
    """
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < OLDEST:
        raise UnsupportedRedisError(f"Redis {version} is too old: REDIS_URL must name version 6.2 or newer")
    if mode != "standalone":
        raise UnsupportedRedisError(f"REDIS_URL names a Redis {mode}: name a single server, which RQ needs")
