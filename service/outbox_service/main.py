"""`outbox service`: runs one API process, configured by the environment and stopped by SIGTERM."""

from outbox.runtime import encryption, logs, pooler, postgres, schema
from outbox.runtime.endpoints import Address
from outbox.runtime.outage import Outage
from outbox.runtime.settings import ServiceSettings
from outbox.runtime.stop import Stop
from outbox_service.server import create_server, listen


def main() -> None:
    """Serves until SIGTERM or SIGINT, then finishes the requests in flight."""
    settings = ServiceSettings.from_environment()
    logs.configure("service", settings.log_level, settings.log_format)
    encryption.warn_about_plain_text(settings.database_url)
    listener = listen(settings.http_server_address)
    outage = Outage("Postgres")
    try:
        with pooler.connect_checked(
            settings.database_url, "outbox service", pooled=settings.transaction_pooling
        ) as connection:
            schema.check_migrated(connection)
            if settings.transaction_pooling:
                pooler.warn_about_missing_settings(connection)
    except postgres.AWAY as error:
        outage.away(error)

    server = create_server(settings, outage)
    stop = Stop()
    stop.listen(lambda: server.obey(stop))
    address = Address(settings.http_server_address.host, listener.getsockname()[1])
    logs.get().info("started", address=str(address))
    server.run(sockets=[listener])
    logs.get().info("stopped")
