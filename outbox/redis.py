"""Connections to Redis, and whether it is one that can serve."""

import ssl
from urllib.parse import parse_qsl, urlencode

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from outbox.errors import UnsupportedRedisError

AWAY = (redis.RedisError, OSError)
"""What redis-py raises when Redis is away, loading, read-only or out of memory: all the same to us."""

OLDEST = (6, 2)

BLOCK = 1.0
"""Seconds that a blocking command may block: also how long a signal may wait to be seen."""


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
    )


def check_options(redis_url: str) -> None:
    """Checks what redis-py makes of a URL's options, by a connection that is made and never opened.

    Raises:
        ValueError: it refuses them, or would fail at each try to connect. The text is as those of `endpoints`.
    """
    connection = _unopened(redis_url)
    if connection is None:
        server, _, options = redis_url.partition("?")
        wrong = sorted({name for name, given in parse_qsl(options) if not _is_taken(server, name, given)})
        raise ValueError(f"has options that such a URL cannot have, or not with this value: {', '.join(wrong)}")
    if isinstance(connection, redis.SSLConnection):
        _check_tls(connection)


def _is_taken(server: str, name: str, given: str) -> bool:
    return _unopened(f"{server}?{urlencode({name: given})}") is not None


def _unopened(redis_url: str) -> object | None:
    try:
        with connect(redis_url, "outbox") as client:
            connection: object = client.connection_pool.make_connection()
    except (ValueError, TypeError, redis.RedisError):
        return None
    return connection


def _check_tls(connection: redis.SSLConnection) -> None:
    """Does what redis-py does at each try to connect, of which some errors would look like an outage."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if connection.ssl_min_version is not None:
            context.minimum_version = connection.ssl_min_version
    except (ValueError, OverflowError):
        raise ValueError("has an option ssl_min_version that is no version of TLS: 771 is 1.2, 772 is 1.3") from None
    try:
        if connection.ca_certs or connection.ca_path:
            context.load_verify_locations(connection.ca_certs, connection.ca_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"has an option ssl_ca_certs or ssl_ca_path that cannot be used: {_reason(error)}") from None
    try:
        if connection.certfile or connection.keyfile:
            # Without a password, OpenSSL would ask for one on the terminal.
            context.load_cert_chain(connection.certfile, connection.keyfile, connection.certificate_password or "")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"has an option ssl_certfile or ssl_keyfile that cannot be used: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Returns what is wrong with a file, without its name."""
    return (isinstance(error, OSError) and error.strerror) or "no certificate is named"


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
    """Checks what INFO tells of a server.

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
