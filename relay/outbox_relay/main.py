"""`outbox relay`: one relay, configured by the environment, stopped by SIGTERM."""

from outbox.runtime import encryption, logs, redis_connection
from outbox.runtime.settings import RelaySettings
from outbox.runtime.stop import Stop
from outbox_relay.loop import Relay


def main() -> None:
    """Runs a relay until SIGTERM or SIGINT."""
    settings = RelaySettings.from_environment()
    redis_connection.check_url(settings.redis_url)
    logs.configure("relay", settings.log_level, settings.log_format)
    encryption.warn_about_plain_text(settings.database_url, redis_url=settings.redis_url)
    stop = Stop()
    stop.listen()
    Relay(settings, stop).run()
