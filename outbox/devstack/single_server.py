"""Runs one embedded server: `python -m outbox.devstack.single_server postgres` or `redis`."""

import sys
from pathlib import Path

from outbox.devstack.data_folder import locked_folder
from outbox.devstack.embedded import embedded_postgres, embedded_redis
from outbox.errors import StartError
from outbox.runtime import logs, process
from outbox.runtime.stop import Stop

SERVERS = {"postgres": ("DATABASE_URL", embedded_postgres), "redis": ("REDIS_URL", embedded_redis)}


def main() -> None:
    """Runs the server that the first argument names until SIGTERM or SIGINT, and prints the URL to export.

    Raises:
        StartError: the argument names no server, or the server does not start.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in SERVERS:
        raise StartError(f"name one of {', '.join(SERVERS)}")
    stop = Stop()
    stop.listen()
    logs.configure("up", "info", None)
    variable, embedded = SERVERS[name]
    with locked_folder(Path(f".outbox-{name}")) as folder, embedded(folder.path) as server:
        sys.stdout.write(f"export {variable}='{server.url}'\n")
        sys.stdout.flush()
        stop.wait()


if __name__ == "__main__":
    process.run(main)
