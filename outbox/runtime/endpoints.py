"""Formats of the servers and addresses in settings.

Each function raises a `ValueError` whose text completes "it …". It never quotes the value, which may hold a password.
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
    """The mail server that `SMTP_URL` names."""

    host: str
    port: int
    security: Literal["none", "tls", "starttls"]
    user: str | None
    password: str | None = None

    def __repr__(self) -> str:
        return f"SmtpServer({self.host}:{self.port}, {self.security})"


@dataclass(frozen=True)
class Address:
    """The address on which the service listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


_SMTP_SCHEMES: Mapping[str, tuple[Literal["none", "tls", "starttls"], int]] = {
    "smtp": ("none", 25),
    "smtps": ("tls", 465),
    "smtp+starttls": ("starttls", 587),
}
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
_REDIS_OPTIONS = {
    *("db", "username", "password", "socket_keepalive", "health_check_interval", "client_name"),
    *("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_password"),
    *("ssl_cert_reqs", "ssl_check_hostname", "ssl_min_version"),
}
"""Options of a Redis URL that do not change what our code relies on, such as replies in bytes and its time limits."""


def postgres_url(value: str) -> str:
    """Checks the URL of a Postgres database; libpq checks its other options when it connects."""
    if not value.startswith(("postgresql://", "postgres://")):
        raise ValueError("must start with postgresql://, as in postgresql://user:password@host:5432/database")
    try:
        options = {name: str(given) for name, given in psycopg.conninfo.conninfo_to_dict(value).items()}
    except psycopg.ProgrammingError:
        # libpq's message may quote the URL with its password.
        raise ValueError("is not a valid Postgres URL; percent-encode special characters in the password") from None
    if value.partition("?")[0].count("@") > 1:
        # For libpq, the password ends at the first '@': errors would quote the rest of it as the host or the database.
        raise ValueError("has more than one '@'; percent-encode special characters in the password")
    for port in filter(None, options.get("port", "").split(",")):
        if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
            raise ValueError(
                "has a port that is not a number from 1 to 65535; percent-encode special characters in the password"
            )
    if options.get("sslmode", "prefer") not in _SSL_MODES:
        raise ValueError(f"has an sslmode that is none of {', '.join(_SSL_MODES)}")
    return value


def redis_url(value: str) -> str:
    """Checks the URL of a Redis database; `redis_connection.check_url` checks the values of its options."""
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        raise ValueError("is not a valid URL; it looks like redis://:password@host:6379/0") from None
    if not value.startswith(_REDIS_SCHEMES):
        raise ValueError("must start with redis://, rediss:// or unix://, as in redis://localhost:6379/0")
    if parts.scheme == "unix" and not parts.path:
        raise ValueError("must name a socket, as in unix:///run/redis.sock")
    database = parts.path.strip("/")
    if parts.scheme != "unix" and database and not database.isdecimal():
        raise ValueError("must end in the number of a database, as in redis://localhost:6379/0")
    options = dict(parse_qsl(parts.query))
    if not options.keys() <= _REDIS_OPTIONS:
        # The options are not quoted: after a '?' in a password they are the rest of it.
        raise ValueError(
            f"has an option other than {', '.join(sorted(_REDIS_OPTIONS))};"
            " percent-encode special characters in the password"
        )
    if options.get("ssl_min_version") not in {None, "771", "772"}:
        raise ValueError("has an ssl_min_version that is neither 771 (TLS 1.2) nor 772 (TLS 1.3)")
    return value


def smtp_server(value: object) -> object:
    """Parses the URL of a mail server."""
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


_HELO = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,253}[A-Za-z0-9])?|\[[A-Za-z0-9:.]{1,60}\]")
"""A domain, or an address in brackets (RFC 5321, 4.1.2)."""


def helo_name(value: str) -> str:
    """Checks the name that the worker gives to the mail server in EHLO."""
    if not _HELO.fullmatch(value):
        raise ValueError("must be a domain name, as in mail.example.com, or an address, as in [192.0.2.1]")
    return value


def mail_from(value: str) -> str:
    """Checks the sender address of mails."""
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
    """Parses `host:port`."""
    if not isinstance(value, str):
        return value
    if not (match := re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[\w.-]*):([0-9]{1,5})", value, re.ASCII)):
        raise ValueError("must be host:port, as in 127.0.0.1:8080")
    if int(match[2]) > 65535:
        raise ValueError("must have a port up to 65535, as in 127.0.0.1:8080")
    return Address(match[1].strip("[]") or "127.0.0.1", int(match[2]))


_URL = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")
"""The characters of a URL (RFC 3986, appendix A)."""


def http_url(value: str) -> str:
    """Checks the URL that links start with, and removes its trailing slash."""
    if not _URL.fullmatch(value):
        raise ValueError("must not contain spaces, line breaks, quotes or other characters that a URL cannot have")
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        raise ValueError("is not a valid URL; it looks like https://example.com") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must start with http:// or https:// and name a host, as in https://example.com")
    if parts.username is not None:
        raise ValueError("must not contain a user and password: they would be in every mail")
    if "?" in value or "#" in value:
        raise ValueError("must not contain '?' or '#': links append a path to it")
    return value.rstrip("/")
