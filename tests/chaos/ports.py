"""Chooses ports that no outgoing connection can occupy while they are closed."""

import random
import socket


def free_port() -> int:
    """Returns a port below the range for outgoing connections, so that it can be closed and reopened."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
