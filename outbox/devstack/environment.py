"""What `outbox up` reads from its environment, and what it adds for the three processes."""

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from outbox.errors import SettingsError, StartError
from outbox.runtime import redis_url
from outbox.runtime.endpoints import Address
from outbox.runtime.settings import RelaySettings, ServiceSettings, WorkerSettings

MAIL_FROM = "Outbox <no-reply@example.com>"

_STAND_INS = {
    "DATABASE_URL": "postgresql:///outbox",
    "REDIS_URL": "unix:///redis.sock",
    "SMTP_URL": "smtp://127.0.0.1",
    "SECRET_KEY": "-" * 32,
    "MAIL_FROM": MAIL_FROM,
    "PUBLIC_URL": "http://127.0.0.1",
}
"""For variables that are not set, while those that are set are checked."""


@dataclass(frozen=True)
class UpSettings:
    """What `outbox up` itself needs to know."""

    address: Address
    """Where the service is to listen."""
    log_level: str
    log_json: bool


def is_set(name: str) -> bool:
    """Returns whether the user has set a variable; an empty one counts as unset, as it does for the processes."""
    return bool(os.environ.get(name))


def read_settings() -> UpSettings:
    """Checks the variables of all three processes before anything is started.

    Raises:
        SettingsError: names every variable that is wrong, a line each.
    """
    with _filled(_STAND_INS):
        wrong: list[str] = []
        for settings in (ServiceSettings, RelaySettings, WorkerSettings):
            try:
                found = settings.from_environment()
                if isinstance(found, RelaySettings | WorkerSettings):
                    redis_url.check(found.redis_url)
            except SettingsError as error:
                wrong += str(error).splitlines()
        if wrong:
            raise SettingsError("\n".join(dict.fromkeys(wrong)))
        service = ServiceSettings.from_environment()
    return UpSettings(service.http_server_address, service.log_level, log_json=service.log_format == "json")


@contextmanager
def _filled(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({name: value for name, value in values.items() if not is_set(name)})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def free_address(address: Address) -> Address:
    """Checks that the service will be able to listen.

    Args:
        address: where to; port 0 asks for any free one.

    Returns:
        The address with a port that is free now.

    Raises:
        StartError: it is taken, or not this machine's, or not this user's to take.
    """
    try:
        family, kind, protocol, _, location = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            # As servers do: connections that ended a moment ago do not count.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(location)
            listener.listen()
            return Address(address.host, listener.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"the address {address} is taken: stop what listens there, or set HTTP_SERVER_ADDRESS to another"
            ) from None
        raise StartError(f"the service cannot listen on {address} (HTTP_SERVER_ADDRESS): {error.strerror}") from None


def local_url(address: Address) -> str:
    """Returns where a browser on this machine finds the service."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 - compared, not bound
    return f"http://{Address(host, address.port)}"


def for_processes(settings: UpSettings, **provided: str) -> dict[str, str]:
    """Returns the environment of the three processes.

    Args:
        settings: of `outbox up`.
        provided: variables that the user has not set.
    """
    defaults = {"MAIL_FROM": MAIL_FROM, "PUBLIC_URL": local_url(settings.address), **provided}
    return {
        **os.environ,
        **{name: value for name, value in defaults.items() if not is_set(name)},
        "HTTP_SERVER_ADDRESS": str(settings.address),
        "LOG_FORMAT": "json",
        "PYTHONUNBUFFERED": "1",
    }
