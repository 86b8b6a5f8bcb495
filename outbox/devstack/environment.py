"""The environment of `outbox up`: its own settings, and the variables that it adds for the three processes."""

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from outbox.errors import SettingsError, StartError
from outbox.runtime import redis_connection
from outbox.runtime.endpoints import Address
from outbox.runtime.settings import RelaySettings, ServiceSettings, WorkerSettings

MAIL_FROM = "Outbox <no-reply@example.com>"

_PLACEHOLDERS = {
    "DATABASE_URL": "postgresql:///outbox",
    "REDIS_URL": "unix:///redis.sock",
    "SMTP_URL": "smtp://127.0.0.1",
    "SECRET_KEY": "-" * 32,
    "MAIL_FROM": MAIL_FROM,
    "PUBLIC_URL": "http://127.0.0.1",
}
"""Values of unset variables while those that are set are checked."""


@dataclass(frozen=True)
class UpSettings:
    """The settings of `outbox up` itself."""

    address: Address
    """The address that the service listens on."""
    log_level: str
    log_json: bool


def is_set(name: str) -> bool:
    """Returns whether the user has set a variable; an empty one counts as unset, as it does for the processes."""
    return bool(os.environ.get(name))


def read_settings() -> UpSettings:
    """Checks the variables of all three processes and returns those that `up` needs.

    Raises:
        SettingsError: variables are wrong: names each on a line of its own.
    """
    with _with_defaults(_PLACEHOLDERS):
        wrong: list[str] = []
        for settings in (ServiceSettings, RelaySettings, WorkerSettings):
            try:
                checked = settings.from_environment()
                if isinstance(checked, RelaySettings | WorkerSettings):
                    redis_connection.check_url(checked.redis_url)
            except SettingsError as error:
                wrong += str(error).splitlines()
        if wrong:
            raise SettingsError("\n".join(dict.fromkeys(wrong)))
        service = ServiceSettings.from_environment()
    return UpSettings(service.http_server_address, service.log_level, log_json=service.log_format == "json")


@contextmanager
def _with_defaults(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({name: value for name, value in values.items() if not is_set(name)})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def find_free_address(address: Address) -> Address:
    """Checks that the service can listen on an address, and returns it with a real port.

    Args:
        address: port 0 stands for any free port.

    Raises:
        StartError: the address is taken, not of this machine, or not allowed to this user.
    """
    try:
        family, kind, protocol, _, location = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            # As the service does: connections in TIME_WAIT do not block the port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(location)
            listener.listen()
            return Address(address.host, listener.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"the address {address} is taken: stop its process, or set HTTP_SERVER_ADDRESS to another"
            ) from None
        raise StartError(f"the service cannot listen on {address} (HTTP_SERVER_ADDRESS): {error.strerror}") from None


def local_url(address: Address) -> str:
    """Returns the URL of the service for a browser on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 - compared, not bound
    return f"http://{Address(host, address.port)}"


def process_environment(settings: UpSettings, **provided: str) -> dict[str, str]:
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
