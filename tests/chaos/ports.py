"""Ports to listen on that no outgoing connection can take while nobody listens on them."""

import random
import socket


def free_port() -> int:
    """Returns a port below those that systems give to outgoing connections, so that it may be closed and reopened."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
