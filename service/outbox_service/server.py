"""The HTTP server: uvicorn's, with the service's limits, headers and stop."""

import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from outbox.errors import StartError
from outbox.runtime import open_files
from outbox.runtime.endpoints import Address
from outbox.runtime.outage import Outage
from outbox.runtime.settings import ServiceSettings
from outbox.runtime.stop import Stop
from outbox_service.app import create_app
from outbox_service.http_protocol import IDLE_TIMEOUT, protocol_factory
from outbox_service.request_log import RequestLog

_RESERVE = 40
"""Descriptors for the log, the listener, the loop and Python itself, besides those of clients and Postgres."""
_PER_CONNECTION = 2
"""Descriptors per connection to Postgres: cancelling a statement takes a second one."""

HEADERS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Frame-Options", "DENY"),
]
"""Headers of every answer. The server adds them, because the application does not write every answer. Answers contain
personal data, links contain secrets, and no page of another site may show them."""


class Server(uvicorn.Server):
    """uvicorn's server, without its signal handlers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Installs no signal handlers."""
        yield

    def obey(self, stop: Stop) -> None:
        """Stops if a stop is requested: after the requests in flight, or at once if it must hurry."""
        self.should_exit = stop.is_requested()
        self.force_exit = stop.is_hurried()


def create_server(settings: ServiceSettings, outage: Outage | None = None) -> Server:
    """Returns the server of the application, not yet running.

    Args:
        settings: the service's settings.
        outage: the state of Postgres as the start found it.
    """
    reserve = _RESERVE + _PER_CONNECTION * settings.pool_size
    limit = open_files.raise_limit(settings.http_connections, reserve, "OUTBOX_HTTP_CONNECTIONS")
    return Server(
        uvicorn.Config(
            RequestLog(create_app(settings, outage)),
            log_config=None,
            access_log=False,
            http=protocol_factory(limit),
            ws="none",
            server_header=False,
            headers=HEADERS,
            timeout_keep_alive=IDLE_TIMEOUT,
            timeout_graceful_shutdown=math.ceil(settings.grace),
        )
    )


def listen(address: Address) -> socket.socket:
    """Returns the listening socket of the service.

    Raises:
        StartError: the port is taken, or the host is not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise StartError(
            f"HTTP_SERVER_ADDRESS: cannot listen on {address} ({error.strerror}); free it or choose another"
        ) from error
    return listener
