"""Warnings at the start of a process about passwords that may cross the network unencrypted."""

import os
from collections.abc import Iterator
from ipaddress import ip_address
from urllib.parse import urlsplit

from psycopg.conninfo import conninfo_to_dict

from outbox.runtime import logs
from outbox.runtime.endpoints import SmtpServer

_ENCRYPTED = frozenset({"require", "verify-ca", "verify-full"})
"""Values of libpq's sslmode that enforce encryption; libpq's default is "prefer"."""


def warn_about_plain_text(
    database_url: str, *, redis_url: str | None = None, smtp_server: SmtpServer | None = None
) -> None:
    """Warns about each server on another machine to which a connection may be unencrypted."""
    for setting, why in _unencrypted(database_url, redis_url, smtp_server):
        logs.get().warning("connection may be unencrypted", setting=setting, why=why)


def _unencrypted(database_url: str, redis_url: str | None, smtp_server: SmtpServer | None) -> Iterator[tuple[str, str]]:
    options = {name: str(value) for name, value in conninfo_to_dict(database_url).items()}
    mode = options.get("sslmode") or os.environ.get("PGSSLMODE") or "prefer"
    hosts = options.get("host") or options.get("hostaddr") or os.environ.get("PGHOST") or ""
    if mode not in _ENCRYPTED and not all(map(_is_local, hosts.split(","))):
        yield "DATABASE_URL", f"sslmode={mode} accepts a server without TLS: set sslmode=verify-full"
    redis = urlsplit(redis_url or "")
    if redis.scheme == "redis" and redis.password and not _is_local(redis.hostname or ""):
        yield "REDIS_URL", "redis:// sends the password in clear: use rediss://"
    if smtp_server and smtp_server.security == "none" and smtp_server.password and not _is_local(smtp_server.host):
        yield "SMTP_URL", "smtp:// sends the password in clear: use smtp+starttls:// or smtps://"


def _is_local(host: str) -> bool:
    """Returns whether a host is this machine: a socket, a loopback address, or empty."""
    if not host or host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
