"""`python -m service`: one API process, configured by the environment, stopped by SIGTERM."""

import math
import signal
import socket

import uvicorn

from outbox import logs, pooler, postgres, start
from outbox.endpoints import Address
from outbox.errors import StartError
from outbox.outage import Outage
from outbox.settings import ServiceSettings
from service.app import create_app
from service.requests import RequestLog


def main() -> None:
    """Serves until SIGTERM or SIGINT, then finishes the requests in flight."""
    settings = ServiceSettings.from_environment()
    logs.configure("service", settings.log_level, settings.log_format)
    listener = listen(settings.http_server_address)
    outage = Outage("Postgres")
    try:
        with pooler.connect_checked(
            settings.database_url, "outbox service", pooled=settings.transaction_pooling
        ) as connection:
            postgres.check_migrated(connection)
            if settings.transaction_pooling:
                pooler.tell_of_missing_settings(connection)
    except postgres.AWAY as error:
        outage.away(error)

    server = uvicorn.Server(
        uvicorn.Config(
            RequestLog(create_app(settings, outage)),
            log_config=None,
            access_log=False,
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=math.ceil(settings.grace),
        )
    )
    # For signals that come before uvicorn listens to them, and for the one that it raises once more in the end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    address = Address(settings.http_server_address.host, listener.getsockname()[1])
    logs.get().info("started", address=str(address))
    server.run(sockets=[listener])
    logs.get().info("stopped")


def listen(address: Address) -> socket.socket:
    """Opens the socket that the service listens on.

    Raises:
        StartError: the port is taken, or the host is none of this machine's.
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


if __name__ == "__main__":
    start.run_process("service", main)
