"""What redis-py makes of a Redis URL: checked by the processes that talk to Redis, before they do."""

import ssl
from urllib.parse import parse_qsl, urlencode

import redis

from outbox.errors import SettingsError
from outbox.runtime import redis_connection


def check(redis_url: str) -> None:
    """Checks a URL that `settings` have nothing against, by a connection that is made and never opened.

    Not done there: the service reads its settings without redis-py, which it has no use for.

    Raises:
        SettingsError: redis-py refuses its options, or would fail at each try to connect.
    """
    try:
        _check(redis_url)
    except ValueError as error:
        raise SettingsError(f"REDIS_URL is wrong: it {error}") from None


def _check(redis_url: str) -> None:
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
        with redis_connection.connect(redis_url, "outbox") as client:
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
    return (isinstance(error, OSError) and error.strerror) or str(error)
