"""The servers and addresses that settings name: what each must look like.

What does not is a `ValueError` whose text goes on after "it …" and never quotes the value, which may hold a password.
"""

import email.errors
import email.headerregistry
import email.utils
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

import psycopg
import psycopg.conninfo


@dataclass(frozen=True)
class SmtpServer:
    """A mail server, as `SMTP_URL` names it."""

    host: str
    port: int
    security: Literal["none", "tls", "starttls"]
    user: str | None
    password: str | None = None

    def __repr__(self) -> str:
        return f"SmtpServer({self.host}:{self.port}, {self.security})"


@dataclass(frozen=True)
class Address:
    """Where the service listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


_SMTP_SCHEMES: Mapping[str, tuple[Literal["none", "tls", "starttls"], int]] = {
    "smtp": ("none", 25),
    "smtps": ("tls", 465),
    "smtp+starttls": ("starttls", 587),
}
POSTGRES_CHOICES: Mapping[str, tuple[str, ...]] = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "sslcertmode": ("disable", "allow", "require"),
    "gssencmode": ("disable", "prefer", "require"),
    "channel_binding": ("disable", "prefer", "require"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
    "load_balance_hosts": ("disable", "random"),
}
"""Options of a Postgres URL that have few values. libpq looks at them only when it connects, and every time anew."""
_POSTGRES_NUMBERS = ("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout")
_REDIS_BEGINNINGS = ("redis://", "rediss://", "unix://")
_REDIS_OPTIONS = {
    *("db", "username", "password", "socket_keepalive", "health_check_interval", "client_name"),
    *("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_password"),
    *("ssl_cert_reqs", "ssl_check_hostname", "ssl_min_version"),
}
"""Options of a Redis URL that leave alone what our code relies on, such as answers in bytes and its time limits."""
_REDIS_NUMBERS = {"db", "health_check_interval"}


def postgres_url(value: str) -> str:
    """Checks a Postgres URL."""
    if not value.startswith(("postgresql://", "postgres://")):
        raise ValueError("must start with postgresql://, as in postgresql://user:password@host:5432/database")
    try:
        options = {name: str(given) for name, given in psycopg.conninfo.conninfo_to_dict(value).items()}
    except psycopg.ProgrammingError:
        # libpq's message may quote the URL, password and all.
        raise ValueError("is not a valid Postgres URL; percent-encode special characters in the password") from None
    for name, choices in POSTGRES_CHOICES.items():
        if options.get(name, choices[0]) not in choices:
            raise ValueError(f"has an option {name} that is none of {', '.join(choices)}")
    for name in _POSTGRES_NUMBERS:
        if not re.fullmatch("-?[0-9]{1,9}", options.get(name, "0")):
            raise ValueError(f"has an option {name} that is not a whole number")
    _check_servers(options)
    return value


def _check_servers(options: Mapping[str, str]) -> None:
    """Checks the lists of Postgres' hosts and ports, of which mostly there is one."""
    hosts, addresses, ports = (options.get(name, "").split(",") for name in ("host", "hostaddr", "port"))
    for port in ports:
        # Without a number in it, it is 5432.
        if port and not (re.fullmatch("[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
            raise ValueError(
                "has a port that is not a number from 1 to 65535; percent-encode special characters in the password"
            )
    servers = len(addresses if options.get("hostaddr") else hosts)
    if len(ports) not in (1, servers) or (options.get("host") and len(hosts) != servers):
        raise ValueError("must have as many ports, or addresses, as it has hosts")


def redis_url(value: str) -> str:
    """Checks a Redis URL."""
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        raise ValueError("is not a valid URL; it looks like redis://:password@host:6379/0") from None
    if not value.startswith(_REDIS_BEGINNINGS):
        raise ValueError("must start with redis://, rediss:// or unix://, as in redis://localhost:6379/0")
    if parts.scheme == "unix" and not parts.path:
        raise ValueError("must name a socket, as in unix:///run/redis.sock")
    database = parts.path.strip("/")
    if parts.scheme != "unix" and database and not database.isdecimal():
        raise ValueError("must end in the number of a database, as in redis://localhost:6379/0")
    if unknown := sorted({name for name, _ in parse_qsl(parts.query)} - _REDIS_OPTIONS):
        raise ValueError(f"has options that are not known here: {', '.join(unknown)}")
    for name, given in parse_qsl(parts.query):
        if name in _REDIS_NUMBERS and not re.fullmatch("[0-9]+", given):
            raise ValueError(f"has an option {name} that is not a whole number")
    # Imported by those alone that talk to Redis: the service reads its settings here too.
    from outbox import redis as outbox_redis  # noqa: PLC0415 - see above

    outbox_redis.check_options(value)
    return value


def smtp_server(value: object) -> object:
    """Reads the URL of a mail server."""
    if not isinstance(value, str):
        return value
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError("is not a valid URL; it looks like smtp+starttls://user:password@host:587") from None
    if parts.scheme not in _SMTP_SCHEMES:
        raise ValueError("must start with smtp://, smtps:// or smtp+starttls://")
    if not parts.hostname:
        raise ValueError("must name a host, as in smtp://localhost:25")
    if (parts.username is None) != (parts.password is None):
        raise ValueError("must have both a user and a password, or neither")
    security, default_port = _SMTP_SCHEMES[parts.scheme]
    return SmtpServer(
        host=parts.hostname,
        port=port or default_port,
        security=security,
        user=unquote(parts.username) if parts.username is not None else None,
        password=unquote(parts.password) if parts.password is not None else None,
    )


def mail_from(value: str) -> str:
    """Checks the sender of mails."""
    addresses = email.utils.getaddresses([value])
    address = addresses[0][1] if len(addresses) == 1 else ""
    try:
        email.headerregistry.Address(addr_spec=address)
    except (ValueError, IndexError, email.errors.HeaderParseError):  # which of them depends on the Python version
        address = ""
    if "@" not in address or re.search(r"[\r\n]", value):
        raise ValueError("must be an e-mail address, as in 'Sign-up <no-reply@example.com>'")
    return value


def http_address(value: object) -> object:
    """Reads `host:port`."""
    if not isinstance(value, str):
        return value
    host, colon, port = value.rpartition(":")
    if not colon or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError("must be host:port, as in 127.0.0.1:8080")
    return Address(host.strip("[]") or "127.0.0.1", int(port))


def http_url(value: str) -> str:
    """Checks what links begin with, and cuts the slash at its end."""
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must start with http:// or https:// and name a host, as in https://example.com")
    if parts.query or parts.fragment:
        raise ValueError("must not hold '?' or '#': what links add would not be part of the path")
    return value.rstrip("/")
