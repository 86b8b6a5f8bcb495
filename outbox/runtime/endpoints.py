"""The servers and addresses that settings name: what each must look like.

What does not is a `ValueError` whose text goes on after "it …" and never quotes the value, which may hold a password.
"""

import email.errors
import email.headerregistry
import email.utils
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

import psycopg
import psycopg.conninfo
from psycopg.pq import PGconn, abc


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
_POSTGRES_NUMBERS = (
    *("connect_timeout", "tcp_user_timeout"),
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
)
"""Options of a Postgres URL that libpq looks at no sooner than it connects, and every time anew."""
_NO_ADDRESS = "what-is-checked-is-not-opened"
"""Stands for the address of a server: libpq looks no name up there, and quotes it."""
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
    if value.partition("?")[0].count("@") > 1:
        # libpq ends the password at the first: the rest would be the host's or the database's name, which errors quote.
        raise ValueError("has an '@' too many; percent-encode special characters in the password")
    for name in _POSTGRES_NUMBERS:
        if not re.fullmatch("-?[0-9]{1,9}", options.get(name, "0")):
            raise ValueError(f"has an option {name} that is not a whole number")
    for address in filter(None, options.get("hostaddr", "").split(",")):
        try:
            socket.getaddrinfo(address, None, flags=socket.AI_NUMERICHOST)
        except (OSError, UnicodeError):
            raise ValueError("has a hostaddr that is not an IP address; names go into host") from None
    if _is_refused(options):
        _raise_refused(options)
    return value


def _is_refused(options: Mapping[str, str]) -> bool:
    """Returns whether libpq would refuse options at each try to connect, before it asks any server.

    It is given no address to connect to, so that for each server, when it has nothing against the rest, it says that.
    """
    # An sslmode that it refuses: it goes no further than to find the hosts, which the environment may name too.
    with _started({**options, "sslmode": ""}) as connection:
        found = {option.keyword: option.val or b"" for option in connection.info}
    servers = (found[b"hostaddr"] or found[b"host"]).count(b",") + 1
    with _started({**options, "hostaddr": ",".join([_NO_ADDRESS] * servers)}) as connection:
        problems = connection.error_message.splitlines()
    return not all(_NO_ADDRESS.encode() in problem for problem in problems)


@contextmanager
def _started(options: Mapping[str, str]) -> Iterator[abc.PGconn]:
    connection = PGconn.connect_start(psycopg.conninfo.make_conninfo("", **options).encode())
    try:
        yield connection
    finally:
        connection.finish()


def _raise_refused(options: Mapping[str, str]) -> NoReturn:
    """Names the options without any of which libpq takes the others; what it says itself quotes their values."""
    wrong = sorted(
        name for name in options if not _is_refused({other: options[other] for other in options if other != name})
    )
    if not {"host", "hostaddr", "port"}.isdisjoint(wrong):
        raise ValueError(
            "has a port that is not a number from 1 to 65535, or not as many ports, or addresses, as it has hosts;"
            " percent-encode special characters in the password"
        )
    if wrong:
        raise ValueError(f"has options that libpq does not take, or not with such a value: {', '.join(wrong)}")
    raise ValueError("has options that libpq does not take, or variables such as PGSSLMODE have")


def redis_url(value: str) -> str:
    """Checks a Redis URL, up to what only redis-py can tell: see `outbox.redis_url`."""
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
    if not {name for name, _ in parse_qsl(parts.query)} <= _REDIS_OPTIONS:
        # Not quoted: what stands behind a question mark may be the rest of a password.
        raise ValueError(
            f"has an option that is not known here, which are {', '.join(sorted(_REDIS_OPTIONS))};"
            " percent-encode special characters in the password"
        )
    for name, given in parse_qsl(parts.query):
        if name in _REDIS_NUMBERS and not re.fullmatch("[0-9]+", given):
            raise ValueError(f"has an option {name} that is not a whole number")
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


_HELO = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,253}[A-Za-z0-9])?|\[[A-Za-z0-9:.]{1,60}\]")
"""A domain, or an address in brackets (RFC 5321, 4.1.2)."""


def helo_name(value: str) -> str:
    """Checks what this machine calls itself to a mail server."""
    if not _HELO.fullmatch(value):
        raise ValueError("must be a domain name, as in mail.example.com, or an address, as in [192.0.2.1]")
    return value


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
    if not (match := re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[\w.-]*):([0-9]{1,5})", value, re.ASCII)):
        raise ValueError("must be host:port, as in 127.0.0.1:8080")
    if int(match[2]) > 65535:
        raise ValueError("must have a port up to 65535, as in 127.0.0.1:8080")
    return Address(match[1].strip("[]") or "127.0.0.1", int(match[2]))


_URL = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")
"""What may be in a URL (RFC 3986, appendix A)."""


def http_url(value: str) -> str:
    """Checks what links begin with, and cuts the slash at its end."""
    if not _URL.fullmatch(value):
        raise ValueError("must hold no spaces, line breaks, quotes or other characters that no URL has")
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        raise ValueError("is not a valid URL; it looks like https://example.com") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must start with http:// or https:// and name a host, as in https://example.com")
    if parts.username is not None:
        raise ValueError("must hold no user and password: it would be in every mail")
    if "?" in value or "#" in value:
        raise ValueError("must not hold '?' or '#': what links add would not be part of the path")
    return value.rstrip("/")
