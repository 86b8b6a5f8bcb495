"""`python -m relay`: one relay, configured by the environment, stopped by SIGTERM."""

import signal
from threading import Event, Thread

from outbox import logs, redis_url, start
from outbox.settings import RelaySettings
from relay.loop import Relay


def main() -> None:
    """Runs a relay until SIGTERM or SIGINT."""
    settings = RelaySettings.from_environment()
    redis_url.check(settings.redis_url)
    logs.configure("relay", settings.log_level, settings.log_format)
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # In a thread: the signal may have struck inside the event's own lock.
        signal.signal(number, lambda *_: Thread(target=stop.set).start())
    Relay(settings, stop).run()


if __name__ == "__main__":
    start.run_process("relay", main)
